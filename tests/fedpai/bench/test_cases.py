# SPDX-License-Identifier: Apache-2.0
"""Layer lists, the work in a layer, and bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import write_layers
from fedpai.bench import BenchError
from fedpai.bench.cases import LayerCase, layers_named, layers_of_network, merged, read_csv, select, to_csv
from fedpai.bench.masks import uniform_mask
from fedpai.bench.work import DIRECTIONS, work_of

CASES = [
    LayerCase("same", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), image=(5, 7)),
    LayerCase("strided", "conv2d", 4, 6, (3, 3), (2, 2), (1, 1), image=(6, 6)),
    LayerCase("point", "conv2d", 4, 6, (1, 1), (2, 2), image=(5, 5)),
    LayerCase("dilated", "conv2d", 4, 4, (3, 2), (1, 2), (2, 0), (2, 1), image=(6, 5)),
    LayerCase("grouped", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), groups=2, image=(2, 2)),
    LayerCase("linear", "linear", 7, 5),
    LayerCase("tokens", "linear", 7, 5, image=(1, 3)),
]


@pytest.mark.parametrize("name", write_layers.LISTS)
def test_committed_lists_are_those_of_the_networks(name: str) -> None:
    committed = write_layers.path_of(name).read_text()
    assert committed == write_layers.rendered(name), "run python benchmarks/write_layers.py"


def test_layers_of_a_network() -> None:
    cases = layers_of_network("resnet18")
    assert len(cases) == 21
    assert [case.kind for case in cases].count("linear") == 1
    sizes = {case.label: case.count for case in merged(cases)}
    assert sizes["64-64 3x3 @32"] == 4
    assert sizes["256-512 1x1/2 @8"] == 1
    assert sum(sizes.values()) == 21


def test_rows_of_linear_layers_are_images_times_tokens() -> None:
    cases = {case.name: case for case in layers_of_network("vit-tiny")}
    assert len(cases) == 2 + 12 * 4
    qkv, last = cases["blocks.3.attention.qkv"], cases["classifier"]
    assert (qkv.image, qkv.label) == ((1, 64), "192-576 linear x64")
    assert (qkv.input_shape(4), qkv.output_shape(4)) == ((256, 192), (256, 576))
    assert (last.image, last.label, last.input_shape(4)) == ((1, 1), "192-10 linear", (4, 192))
    assert cases["patches"].label == "3-192 4x4/4 @32"
    assert layers_of_network("vit-tiny", 1, 28)[1].input_shape(2) == (2 * 49, 192)


def test_layers_of_a_transformer() -> None:
    cases = layers_named("transformer")
    assert [case.weight_shape for case in cases] == [(3072, 768), (768, 3072), (2304, 768), (768, 768)]
    assert {case.input_shape(2048)[0] for case in cases} == {2048}
    assert layers_named(str(write_layers.path_of("transformer"))) == cases
    assert layers_named("mlp") == layers_of_network("mlp")


def test_csv_and_back(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    cases = [replace(case, count=number) for number, case in enumerate(CASES, 1)]
    path.write_text(to_csv(cases))
    assert read_csv(path) == cases


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("3x3", "3"), "line 2"),
        (("conv2d", "conv3d"), "kind: got 'conv3d'"),
        ((",4,6,", ",0,6,"), "sizes must be positive"),
        (("5x7", "0x7"), "sizes must be positive"),
        (("name,", "title,"), "expected the columns"),
    ],
)
def test_bad_csv_names_its_line(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(to_csv(CASES[:1]).replace(*change, 1))
    with pytest.raises(BenchError, match=words):
        read_csv(path)


def test_selection() -> None:
    assert [c.name for c in select(CASES, ["3x3"], ["conv2d"])] == ["same", "strided", "grouped"]
    assert [c.name for c in select(CASES, ["s*", "1x1"], ["conv2d"])] == ["same", "strided", "point"]
    assert [c.name for c in select(CASES, [], ["linear"])] == ["linear", "tokens"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_work_counts_products_inside_the_image(case: LayerCase) -> None:
    """A convolution of ones with a mask counts them."""
    mask, batch = uniform_mask(case.weight_shape, 0.3), 2

    def products(weight: torch.Tensor) -> int:
        if case.kind == "linear":
            return int(functional.linear(torch.ones(case.input_shape(batch)), weight).sum())
        x = torch.ones(case.input_shape(batch))
        return int(
            functional.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups).sum()
        )

    for direction, passes in zip(DIRECTIONS, (1, 1, 1, 2, 3), strict=True):
        work = work_of(case, mask, batch, direction)
        assert work.useful_flop == 2 * passes * products(mask.float())
        assert work.dense_flop == 2 * passes * products(torch.ones(case.weight_shape))


def test_bytes_leave_out_what_no_weight_touches() -> None:
    case = LayerCase("point", "conv2d", 4, 6, (1, 1), (2, 2), image=(5, 5))
    mask = torch.zeros(case.weight_shape, dtype=torch.bool)
    mask[1, 2] = mask[3, 2] = True
    batch, in_pixels, out_pixels, kept = 2, 25, 9, 2
    x, y, dy, dx = batch * out_pixels, batch * 6 * out_pixels, batch * 2 * out_pixels, batch * 4 * in_pixels
    assert work_of(case, mask, batch, "forward").bytes == 4 * (x + kept + y)
    assert work_of(case, mask, batch, "input-grad").bytes == 4 * (dy + kept + dx)
    assert work_of(case, mask, batch, "weight-grad").bytes == 4 * (x + dy + kept)
