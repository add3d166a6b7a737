"""The architectures at full size, on the meta device: the published parameter counts."""

from __future__ import annotations

import pytest

from didr_core import registry
from didr_core.backbones import full_size

PUBLISHED = {
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "vae"): 83_653_863,
    ("sdxl", "decoder"): 2_445_063,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("zimage", "transformer"): 6_154_908_736,
    ("zimage", "vae"): 83_819_683,
    ("zimage", "decoder"): 2_458_899,
    ("zimage", "text_encoder"): 4_022_468_096,
}


@pytest.mark.parametrize(("family", "part"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(family: str, part: str) -> None:
    network = full_size.NETWORKS[family][part]()
    assert full_size.parameters(network) == PUBLISHED[family, part]
    assert {p.device.type for p in network.parameters()} == {"meta"}


def test_every_network_is_counted_and_the_file_is_no_backbone() -> None:
    assert {(family, part) for family, parts in full_size.NETWORKS.items() for part in parts} == set(PUBLISHED)
    assert "full_size" not in registry.names("backbones")
