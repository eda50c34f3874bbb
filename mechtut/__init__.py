"""Mechanistic interpretability, one paper per notebook: read it, run it, import it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechtut._packages import lazy_package

__version__ = "0.2.0"

# Public name -> the module that has it. A module is imported when one of its names is
# first asked for, so that `import mechtut` itself needs neither torch nor transformers.
_WHERE = {
    "Activations": "models.hooks",
    "capture": "models.hooks",
    "Edit": "models.hooks",
    "intervene": "models.hooks",
    "Site": "models.hooks",
    "load_model": "models.loading",
    "Model": "models.loading",
    "Replay": "patching.replay",
    "ablate_grid": "patching.grids",
    "AnswerMetric": "patching.grids",
    "Grid": "patching.grids",
    "patch_grid": "patching.grids",
    "attribute_grid": "patching.attribution",
    "patchscope": "patching.patchscopes",
    "patchscope_grid": "patching.patchscopes",
    "SoftPrompt": "patching.places",
    "Source": "patching.places",
    "Target": "patching.places",
    "ICLPrompt": "prompts.few_shot",
    "load_task": "prompts.few_shot",
    "sample_prompts": "prompts.few_shot",
    "Task": "prompts.few_shot",
    "layer_average": "prompts.mean_activations",
    "mean_head_activations": "prompts.mean_activations",
    "Noise": "prompts.subject_noise",
    "Fact": "mini.world",
    "World": "mini.world",
    "key_covariance": "editing.covariance",
    "evaluate_edit": "editing.evaluation",
    "context_templates": "editing.requests",
    "WeightEdit": "editing.weights",
    "attribution_scores": "circuits.attribution",
    "EdgeScores": "circuits.attribution",
    "Circuit": "circuits.circuit",
    "evaluate_circuit": "circuits.circuit",
    "roc": "circuits.circuit",
    "head_scores": "circuits.heads",
    "inspect_head": "circuits.heads",
    "path_patch_grid": "circuits.paths",
    "logit_attribution": "lenses.attribution",
    "AffineLens": "lenses.trajectory",
    "FutureLens": "lenses.future",
    "JacobianLens": "lenses.jacobian",
    "TunedLens": "lenses.tuned",
    "logit_lens": "lenses.trajectory",
    "refine": "circuits.refining",
    "RefinedCircuit": "circuits.refining",
    "SteeringVector": "steering.vectors",
    "act_add": "steering.vectors",
    "mean_difference": "steering.vectors",
    "reading_vectors": "steering.reading",
    "head_directions": "steering.heads",
    "steer": "steering.acting",
    "ablation_direction": "steering.ablation",
    "orthogonalise": "steering.ablation",
    "evaluate_steering": "steering.evaluation",
    "ModularAddition": "grokking.network",
    "train_modular": "grokking.training",
    "collect": "neurons.collect",
    "NeuronRecords": "neurons.records",
    "explore_heads": "viz.interactive",
    "explore_trace": "viz.interactive",
    "acdc": "papers.acdc",
    "activation_patching": "papers.activation_patching",
    "self_repair": "papers.activation_patching",
    "AverageTrace": "papers.causal_tracing",
    "CausalTrace": "papers.causal_tracing",
    "trace": "papers.causal_tracing",
    "trace_facts": "papers.causal_tracing",
    "function_vector": "papers.function_vectors",
    "FunctionVector": "papers.function_vectors",
    "indirect_effect": "papers.function_vectors",
    "inject": "papers.function_vectors",
    "explain": "papers.neuron_explanation",
    "score_explanation": "papers.neuron_explanation",
    "simulate": "papers.neuron_explanation",
    "compare_lenses": "papers.lenses",
    "describe": "papers.patchscopes",
    "token_identity": "papers.patchscopes",
    "edit_fact": "papers.rome",
    "RomeConfig": "papers.rome",
    "RomeEdit": "papers.rome",
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
    from mechtut.circuits.attribution import (
        EdgeScores as EdgeScores,
        attribution_scores as attribution_scores,
    )
    from mechtut.circuits.circuit import (
        Circuit as Circuit,
        evaluate_circuit as evaluate_circuit,
        roc as roc,
    )
    from mechtut.circuits.heads import (
        head_scores as head_scores,
        inspect_head as inspect_head,
    )
    from mechtut.circuits.paths import (
        path_patch_grid as path_patch_grid,
    )
    from mechtut.circuits.refining import (
        RefinedCircuit as RefinedCircuit,
        refine as refine,
    )
    from mechtut.editing.covariance import (
        key_covariance as key_covariance,
    )
    from mechtut.editing.evaluation import (
        evaluate_edit as evaluate_edit,
    )
    from mechtut.editing.requests import (
        context_templates as context_templates,
    )
    from mechtut.editing.weights import (
        WeightEdit as WeightEdit,
    )
    from mechtut.grokking.network import (
        ModularAddition as ModularAddition,
    )
    from mechtut.grokking.training import (
        train_modular as train_modular,
    )
    from mechtut.lenses.attribution import (
        logit_attribution as logit_attribution,
    )
    from mechtut.lenses.future import (
        FutureLens as FutureLens,
    )
    from mechtut.lenses.jacobian import (
        JacobianLens as JacobianLens,
    )
    from mechtut.lenses.trajectory import (
        AffineLens as AffineLens,
        logit_lens as logit_lens,
    )
    from mechtut.lenses.tuned import (
        TunedLens as TunedLens,
    )
    from mechtut.mini.world import (
        Fact as Fact,
        World as World,
    )
    from mechtut.models.hooks import (
        Activations as Activations,
        Edit as Edit,
        Site as Site,
        capture as capture,
        intervene as intervene,
    )
    from mechtut.models.loading import (
        Model as Model,
        load_model as load_model,
    )
    from mechtut.neurons.collect import (
        collect as collect,
    )
    from mechtut.neurons.records import (
        NeuronRecords as NeuronRecords,
    )
    from mechtut.papers.acdc import (
        acdc as acdc,
    )
    from mechtut.papers.activation_patching import (
        activation_patching as activation_patching,
        self_repair as self_repair,
    )
    from mechtut.papers.causal_tracing import (
        AverageTrace as AverageTrace,
        CausalTrace as CausalTrace,
        trace as trace,
        trace_facts as trace_facts,
    )
    from mechtut.papers.function_vectors import (
        FunctionVector as FunctionVector,
        function_vector as function_vector,
        indirect_effect as indirect_effect,
        inject as inject,
    )
    from mechtut.papers.lenses import (
        compare_lenses as compare_lenses,
    )
    from mechtut.papers.neuron_explanation import (
        explain as explain,
        score_explanation as score_explanation,
        simulate as simulate,
    )
    from mechtut.papers.patchscopes import (
        describe as describe,
        token_identity as token_identity,
    )
    from mechtut.papers.rome import (
        RomeConfig as RomeConfig,
        RomeEdit as RomeEdit,
        edit_fact as edit_fact,
    )
    from mechtut.patching.attribution import (
        attribute_grid as attribute_grid,
    )
    from mechtut.patching.grids import (
        AnswerMetric as AnswerMetric,
        Grid as Grid,
        ablate_grid as ablate_grid,
        patch_grid as patch_grid,
    )
    from mechtut.patching.patchscopes import (
        patchscope as patchscope,
        patchscope_grid as patchscope_grid,
    )
    from mechtut.patching.places import (
        SoftPrompt as SoftPrompt,
        Source as Source,
        Target as Target,
    )
    from mechtut.patching.replay import (
        Replay as Replay,
    )
    from mechtut.prompts.few_shot import (
        ICLPrompt as ICLPrompt,
        Task as Task,
        load_task as load_task,
        sample_prompts as sample_prompts,
    )
    from mechtut.prompts.mean_activations import (
        layer_average as layer_average,
        mean_head_activations as mean_head_activations,
    )
    from mechtut.prompts.subject_noise import (
        Noise as Noise,
    )
    from mechtut.steering.ablation import (
        ablation_direction as ablation_direction,
        orthogonalise as orthogonalise,
    )
    from mechtut.steering.acting import (
        steer as steer,
    )
    from mechtut.steering.evaluation import (
        evaluate_steering as evaluate_steering,
    )
    from mechtut.steering.heads import (
        head_directions as head_directions,
    )
    from mechtut.steering.reading import (
        reading_vectors as reading_vectors,
    )
    from mechtut.steering.vectors import (
        SteeringVector as SteeringVector,
        act_add as act_add,
        mean_difference as mean_difference,
    )
    from mechtut.viz.interactive import (
        explore_heads as explore_heads,
        explore_trace as explore_trace,
    )
