"""What is told of a program that was compiled for a device that is not here."""

import pytest

from benchmarks import ahead
from benchmarks.ahead import Kernel
from mer_jax.errors import UserError

PROGRAM = """HloModule jit_epochs, is_scheduled=true

%fused (p0: f32[2,3], p1: pred[2]) -> f32[2,3] {
  %p0 = f32[2,3]{1,0} parameter(0)
  %p1 = pred[2]{0} parameter(1)
  ROOT %sum = f32[2,3]{1,0} add(%p0, %p0)
}

%body (state: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %state = (s32[], f32[2,3]{1,0}) parameter(0)
  %x = f32[2,3]{1,0} get-tuple-element(%state), index=1
  %flags = pred[2]{0} custom-call(%x), custom_call_target="flags"
  %loop_fusion = f32[2,3]{1,0} fusion(%x, %flags), kind=kLoop, calls=%fused, metadata={op_name="jit(epochs)/add"}
  %pair = (f32[2,3]{1,0}, u8[5]{0}) custom-call(%loop_fusion), custom_call_target="pair"
  ROOT %out = (s32[], f32[2,3]{1,0}) tuple(%x, %loop_fusion)
}

ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  ROOT %x = f32[2,3]{1,0} parameter(0)
}
"""


def test_kernels_and_their_bytes_by_hand():
    assert ahead.loops_of(PROGRAM) == {
        "body": [
            Kernel("flags", 24 + 2, ""),
            Kernel("loop_fusion", 24 + 24 + 2, "jit(epochs)/add"),
            Kernel("pair", 24 + 5 + 24, ""),
        ]
    }


def test_a_compiler_that_is_absent_is_one_line(monkeypatch):
    def absent(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", absent)
    with pytest.raises(
        UserError, match=r"no compiler for cuda \(topology not .*\); install jax's build for it in an env"
    ):
        ahead.target_device(ahead.TARGETS["h100"])
