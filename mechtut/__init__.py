"""Mechanistic interpretability, one paper per notebook: read it, run it, import it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechtut._lazy import lazy_package

__version__ = "0.2.0"

# Public name -> the module that has it. A module is imported when one of its names is first asked for,
# so that `import mechtut` itself needs neither torch nor transformers.
_WHERE = {
    "Model": "models.loading",
    "load_model": "models.loading",
    "Site": "models.hooks",
    "capture": "models.hooks",
    "Edit": "models.hooks",
    "intervene": "models.hooks",
    "Replay": "patching.replay",
    "Noise": "prompts.subject_noise",
    "AverageTrace": "papers.causal_tracing",
    "CausalTrace": "papers.causal_tracing",
    "trace": "papers.causal_tracing",
    "trace_facts": "papers.causal_tracing",
    "acdc": "papers.acdc",
    "RomeConfig": "papers.rome",
    "context_templates": "papers.rome",
    "edit_fact": "papers.rome",
    "key_covariance": "papers.rome",
    "evaluate_edit": "editing.evaluation",
    "ICLPrompt": "prompts.few_shot",
    "load_task": "prompts.few_shot",
    "sample_prompts": "prompts.few_shot",
    "function_vector": "papers.function_vectors",
    "indirect_effect": "papers.function_vectors",
    "inject": "papers.function_vectors",
    "layer_average": "papers.function_vectors",
    "mean_head_activations": "papers.function_vectors",
    "Circuit": "circuits.circuit",
    "evaluate_circuit": "circuits.circuit",
    "roc": "circuits.circuit",
    "attribution_scores": "circuits.attribution",
    "refine": "circuits.refining",
    "NeuronRecords": "neurons.records",
    "collect": "neurons.collect",
    "explain": "papers.neuron_explanation",
    "simulate": "papers.neuron_explanation",
    "score_explanation": "papers.neuron_explanation",
    "explore_heads": "viz.interactive",
    "explore_trace": "viz.interactive",
    "Fact": "mini.world",
    "World": "mini.world",
}

__all__ = ["__version__", *sorted(_WHERE)]


_package, _packages = lazy_package(__name__, __path__)


def __getattr__(name: str) -> Any:
    """Import the module behind a public name, or a package asked for as `mechtut.viz`."""
    if name in _WHERE:
        value = getattr(import_module(f"mechtut.{_WHERE[name]}"), name)
        globals()[name] = value  # next time Python finds it without asking here
        return value
    if name in _packages():
        return _package(name)
    known = ", ".join([*__all__, *_packages()])
    raise AttributeError(f"module 'mechtut' has no attribute {name!r}; it has {known}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_packages()})


if TYPE_CHECKING:  # what type checkers and editors read
    from mechtut.circuits.attribution import attribution_scores as attribution_scores
    from mechtut.papers.causal_tracing import (
        AverageTrace as AverageTrace,
        CausalTrace as CausalTrace,
        trace as trace,
        trace_facts as trace_facts,
    )
    from mechtut.circuits.circuit import (
        Circuit as Circuit,
        evaluate_circuit as evaluate_circuit,
        roc as roc,
    )
    from mechtut.neurons.collect import collect as collect
    from mechtut.prompts.subject_noise import Noise as Noise
    from mechtut.editing.evaluation import evaluate_edit as evaluate_edit
    from mechtut.papers.function_vectors import (
        function_vector as function_vector,
        indirect_effect as indirect_effect,
        inject as inject,
        layer_average as layer_average,
        mean_head_activations as mean_head_activations,
    )
    from mechtut.prompts.few_shot import (
        ICLPrompt as ICLPrompt,
        load_task as load_task,
        sample_prompts as sample_prompts,
    )
    from mechtut.viz.interactive import (
        explore_heads as explore_heads,
        explore_trace as explore_trace,
    )
    from mechtut.models.loading import Model as Model, load_model as load_model
    from mechtut.papers.neuron_explanation import (
        explain as explain,
        score_explanation as score_explanation,
        simulate as simulate,
    )
    from mechtut.neurons.records import NeuronRecords as NeuronRecords
    from mechtut.circuits.refining import refine as refine
    from mechtut.patching.replay import Replay as Replay
    from mechtut.papers.rome import (
        RomeConfig as RomeConfig,
        context_templates as context_templates,
        edit_fact as edit_fact,
        key_covariance as key_covariance,
    )
    from mechtut.models.hooks import (
        Edit as Edit,
        Site as Site,
        capture as capture,
        intervene as intervene,
    )
    from mechtut.mini.world import Fact as Fact, World as World
