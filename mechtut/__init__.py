"""Mechanistic interpretability, one paper per notebook: read it, run it, import it."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that has it. A module is imported when one of its names is first asked for,
# so that `import mechtut` itself needs neither torch nor transformers.
_WHERE = {
    "Model": "models",
    "load_model": "models",
    "Site": "sites",
    "capture": "sites",
    "Edit": "sites",
    "intervene": "sites",
    "Replay": "replay",
    "Noise": "corruption",
    "AverageTrace": "causal_tracing",
    "CausalTrace": "causal_tracing",
    "trace": "causal_tracing",
    "trace_facts": "causal_tracing",
    "RomeConfig": "rome",
    "context_templates": "rome",
    "edit_fact": "rome",
    "key_covariance": "rome",
    "evaluate_edit": "editing",
    "ICLPrompt": "icl",
    "load_task": "icl",
    "sample_prompts": "icl",
    "function_vector": "function_vectors",
    "indirect_effect": "function_vectors",
    "inject": "function_vectors",
    "layer_average": "function_vectors",
    "mean_head_activations": "function_vectors",
    "Circuit": "circuits",
    "evaluate_circuit": "circuits",
    "roc": "circuits",
    "attribution_scores": "attribution",
    "refine": "refining",
    "NeuronRecords": "records",
    "collect": "collecting",
    "explain": "neuron_explanation",
    "simulate": "neuron_explanation",
    "score_explanation": "neuron_explanation",
    "explore_heads": "interactive",
    "explore_trace": "interactive",
    "Fact": "world",
    "World": "world",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name, or a submodule asked for as `mechtut.plots` (PEP 562)."""
    if name in _WHERE:
        value = getattr(import_module(f"mechtut.{_WHERE[name]}"), name)
        globals()[name] = value  # next time Python finds it without asking here
        return value
    if not name.startswith("_") and find_spec(f"mechtut.{name}"):
        return import_module(f"mechtut.{name}")
    raise AttributeError(f"module 'mechtut' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    modules = {m.name for m in iter_modules(__path__) if not m.name.startswith("_")}
    return sorted({*__all__, *modules})


if TYPE_CHECKING:  # what type checkers and editors read
    from mechtut.attribution import attribution_scores as attribution_scores
    from mechtut.causal_tracing import (
        AverageTrace as AverageTrace,
        CausalTrace as CausalTrace,
        trace as trace,
        trace_facts as trace_facts,
    )
    from mechtut.circuits import Circuit as Circuit, evaluate_circuit as evaluate_circuit, roc as roc
    from mechtut.collecting import collect as collect
    from mechtut.corruption import Noise as Noise
    from mechtut.editing import evaluate_edit as evaluate_edit
    from mechtut.function_vectors import (
        function_vector as function_vector,
        indirect_effect as indirect_effect,
        inject as inject,
        layer_average as layer_average,
        mean_head_activations as mean_head_activations,
    )
    from mechtut.icl import ICLPrompt as ICLPrompt, load_task as load_task, sample_prompts as sample_prompts
    from mechtut.interactive import explore_heads as explore_heads, explore_trace as explore_trace
    from mechtut.models import Model as Model, load_model as load_model
    from mechtut.neuron_explanation import (
        explain as explain,
        score_explanation as score_explanation,
        simulate as simulate,
    )
    from mechtut.records import NeuronRecords as NeuronRecords
    from mechtut.refining import refine as refine
    from mechtut.replay import Replay as Replay
    from mechtut.rome import (
        RomeConfig as RomeConfig,
        context_templates as context_templates,
        edit_fact as edit_fact,
        key_covariance as key_covariance,
    )
    from mechtut.sites import Edit as Edit, Site as Site, capture as capture, intervene as intervene
    from mechtut.world import Fact as Fact, World as World
