"""The picture of trust ratios shows the table that it is given."""

import matplotlib.figure
import numpy as np
import pytest

from keras_lars import _heat_map


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Returns a function that draws and returns the axes of the picture."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)

    def draw(labels, table):
        path = tmp_path / "picture.png"
        _heat_map.draw(labels, np.array(table), every_n_steps=10, path=path)
        assert path.stat().st_size > 5000
        return figures[0].axes

    return draw


def label_texts(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_picture_shows_the_table(drawn):
    table = [
        [10.0, 1e-3, 0.0, 1.0],
        [20.0, np.nan, 1e-2, np.inf],
        [40.0, 1e-4, -1.0, 0.5],
    ]
    axes, bar = drawn(["a", "b", "c"], table)
    mesh = axes.collections[0]
    np.testing.assert_array_equal(
        mesh.get_array().filled(-9),
        [[1e-3, -9, 1e-4], [-9, 1e-2, -9], [1.0, -9, 0.5]],
    )
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1e-4, 1.0)
    # Every step is inside its own cell.
    assert mesh.get_coordinates()[0, :, 0].tolist() == [5, 15, 30, 45]
    assert label_texts(axes) == ["a", "b", "c"]
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert axes.get_xlabel() == "step"
    assert "trust ratio" in (bar.get_xlabel(), bar.get_ylabel())
    assert bar.get_xscale() == "log"


@pytest.mark.parametrize("value", [0.0, np.nan, 0.01])
def test_picture_of_one_value(drawn, value):
    axes, _ = drawn(["a"], [[10.0, value]])
    assert axes.get_xlim() == (5, 15)


def test_picture_of_many_layers_has_fewer_labels(drawn):
    labels = [f"layer{i}/kernel" for i in range(4000)]
    table = np.full((2, 4001), 0.1)
    table[:, 0] = 10, 20
    axes, _ = drawn(labels, table)
    assert label_texts(axes) == labels[::20]
