"""The papers' figures: what stands in which panel, and ticks on whole layers."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from mechtut.viz import plots

ROLES = ("first subject token", "last subject token", "last token")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def a_trace(component: str, top: float) -> SimpleNamespace:
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) / 2
    scores[1, 2] = top
    return SimpleNamespace(
        scores=scores,
        tokens=[" Martin", " Riley", " is"],
        subject_range=(0, 2),
        positions=(0, 1, 2),
        answer=" pilot",
        component=component,
        window=3,
        corrupted_prob=0.05,
    )


def an_average(component: str, seed: int) -> SimpleNamespace:
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))
    half = torch.full((3, 5), 0.05)
    return SimpleNamespace(
        indirect_effect=drawn, half_width=half, roles=ROLES, component=component
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_traces_share_their_colours_and_stand_as_asked(stacked):
    traces = [a_trace("mlp_out", 0.6), a_trace("attn_out", 0.9)]
    figure = plots.causal_traces(traces, stacked=stacked)
    panels = [ax for ax in figure.axes if ax.get_xlabel()]
    assert [p.images[0].get_clim()[1] for p in panels] == pytest.approx([0.9, 0.9])
    spec = panels[1].get_subplotspec()
    assert (spec.rowspan.start, spec.colspan.start) == ((1, 0) if stacked else (0, 1))
    for panel, t in zip(panels, traces, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), t.scores)
        named = panel.get_xlabel() if stacked else panel.get_title()
        assert plots.COMPONENTS[t.component][0] in named


def lines(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def test_a_panel_per_role_has_a_line_per_component():
    averages = [an_average(c, i) for i, c in enumerate(plots.COMPONENTS)]
    figure = plots.average_lines(averages, by_role=True)
    panels = [ax for ax in figure.axes if ax.axison]
    assert [p.get_title() for p in panels] == list(ROLES)
    assert len(figure.axes) == 4, "three panels, two in a row, and an empty place"
    for i, panel in enumerate(panels):
        drawn = lines(panel)
        for average in averages:
            name, _, colour = plots.COMPONENTS[average.component]
            np.testing.assert_allclose(drawn[name], average.indirect_effect[i])
            (line,) = (x for x in panel.lines if x.get_label() == name)
            assert line.get_color() == colour


def test_a_panel_per_component_has_a_line_per_role():
    averages = [an_average(c, i) for i, c in enumerate(plots.COMPONENTS)]
    figure = plots.average_lines(averages, ["last token", "last subject token"])
    assert len(figure.axes) == 3
    for panel, average in zip(figure.axes, averages, strict=True):
        assert panel.get_title() == plots.COMPONENTS[average.component][0]
        drawn = lines(panel)
        assert "first subject token" not in drawn
        for role in ("last subject token", "last token"):
            i = ROLES.index(role)
            np.testing.assert_allclose(drawn[role], average.indirect_effect[i])


@pytest.mark.parametrize("n_layers", [2, 4, 30])
def test_ticks_are_layers(n_layers):
    layers = range(n_layers)
    table = pd.DataFrame({"layer": layers, "top1": 0.5, "low": 0.4, "high": 0.6})
    ax = plots.accuracy_by_layer({"vector": table}, {"high": 0.97, "low": 0.2})
    assert all(float(t).is_integer() for t in ax.get_xticks())
    below = {t.get_text(): t.get_verticalalignment() for t in ax.texts}
    assert below == {"high": "top", "low": "bottom"}, "a name is not cut off"


def test_what_cannot_be_drawn_is_told():
    values = np.zeros((2, 3))
    with pytest.raises(ValueError, match="2 rows, but there are 1 row names"):
        plots.heat_map(values, ["a"], low=0.0, label="x")
    with pytest.raises(ValueError, match=r"\(1, 4\) is not a range of 3 tokens"):
        plots.starred(["a", "b", "c"], (1, 4))
    with pytest.raises(IndexError, match="no head 3 in layer 0"):
        plots.head_effects(values, [(0, 3)])
    with pytest.raises(ValueError, match="at least 1 of them, not \\[\\]"):
        plots.causal_traces([])
    with pytest.raises(ValueError, match="at least 1 of them, not \\[\\]"):
        plots.average_lines([])
    with pytest.raises(TypeError, match="trace must be a CausalTrace, not 3"):
        plots.causal_trace(3)
