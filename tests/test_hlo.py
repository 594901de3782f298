"""What is read from a program's text, of texts by hand and of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from train.tpu import hlo

LOOP = """
HloModule jit_f, is_scheduled=true

%kernel (p0: f32[8,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
}

%store (p0: f32[1,4], p1: f32[8,4], p2: s32[]) -> f32[8,4] {
  %p1 = f32[8,4]{1,0} parameter(1)
  %p0 = f32[1,4]{1,0} parameter(0)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[8,4]{1,0} dynamic-update-slice(%p1, %p0, %p2, %zero)
}

%body (state: (s32[], f32[8,4], f32[8,4])) -> (s32[], f32[8,4], f32[8,4]) {
  %state = (s32[]{:S(2)}, f32[8,4]{1,0}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%state), index=0
  %far = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %near = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=2
  %row = f32[1,4]{1,0:T(8,128)S(1)} fusion(%far, %i), kind=kLoop, calls=%kernel
  %sum = f32[8,4]{1,0:T(8,128)S(1)} add(%near, %near)
  %new = f32[8,4]{1,0} fusion(%row, %far, %i), kind=kLoop, calls=%store
  ROOT %after = (s32[], f32[8,4], f32[8,4]) tuple(%i, %new, %sum)
}

%condition (state: (s32[], f32[8,4], f32[8,4])) -> pred[] {
  %state = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:S(6)} compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %copy-start = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,4]{1,0:S(1)} copy-done(%copy-start)
  %zero = s32[]{:S(2)} constant(0)
  %init = (s32[], f32[8,4], f32[8,4]) tuple(%zero, %x, %copy-done)
  %loop = (s32[], f32[8,4], f32[8,4]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


class TestCountCollectives:
    def test_by_hand(self):
        text = """
ENTRY %main {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%a), replica_groups={}
  %all-reduce-start.2 = (f32[3]{0}, bf16[2,2]{1,0}) all-reduce-start(%b, %c)
  %all-reduce-done.2 = (f32[3]{0}, bf16[2,2]{1,0}) all-reduce-done(%all-reduce-start.2)
  ROOT %all-gather.3 = u8[16]{0} all-gather(%d), dimensions={0}
  %add.4 = f32[8,4]{1,0} add(%all-reduce.1, %all-reduce.1)
}
"""
        assert hlo.count_collectives(text) == {
            "all-reduce": (2, 8 * 4 * 4 + 3 * 4 + 4 * 2),
            "all-gather": (1, 16),
        }


class TestMainMemoryBytes:
    def test_by_hand(self):
        """One copy into fast memory; in five trips a row read and a row written."""
        assert hlo.main_memory_bytes(LOOP) == 8 * 4 * 4 + 5 * (4 * 4 + 4 * 4)

    @pytest.mark.parametrize("num_steps", [4, 12])
    def test_every_trip_of_a_compiled_loop_counts(self, num_steps):
        def double(x, _):
            return jnp.sin(x) @ x, None

        @jax.jit
        def repeat(x):
            return jax.lax.scan(double, x, length=num_steps)[0]

        size = 4 * 64 * 64
        text = repeat.lower(jnp.ones((64, 64))).compile().as_text()
        # sin reads and writes, the product reads two and writes one.
        assert 5 <= hlo.main_memory_bytes(text) / size / num_steps < 8
