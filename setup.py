"""Hands setuptools what settings.ini holds: the version, the description and the
requirements.
"""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(interpolation=None)
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {
    name: settings[f"{name}_requirements"].split()
    for name in ("tutorials", "servers", "circuits", "gguf", "captum", "docs", "dev")
}
extras["dev"] += (
    extras["tutorials"] + extras["servers"] + extras["circuits"] + extras["docs"]
)

setup(
    version=settings["version"],
    description=settings["description"],
    install_requires=settings["requirements"].split(),
    extras_require=extras,
)
