"""A prefix in the encoder does what as many vectors in the decoder cannot."""

from __future__ import annotations

import pytest
import torch

from benchmarks.encoder_prefix import WHERE, dev_losses, make_base


@pytest.mark.slow
def test_encoder_and_decoder_beat_the_decoder_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    try:
        base = make_base()
        found = {name: dev_losses(base, "copy", where)[-1][1] for name, where in WHERE.items()}
    finally:
        torch.set_num_threads(before)
    decoder, both = found.values()
    assert both < 0.2 * decoder, found
