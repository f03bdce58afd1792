"""What the emulator of CUDA kernels finds: each fault by a small kernel that has it, and one like it that has not."""

from collections.abc import Iterator

import emulator.kernels
import pytest
import torch
from emulator.kernels import emulated, has_compiler

from src.ops.kernels import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

SOURCE = """
#include "wkv7_primitives.cuh"

namespace probe {

// Lane l of warp w leaves l at word l, and takes what its neighbour left.
template <bool kWaits>
__global__ void neighbours(float* result) {
  const int lane = threadIdx.x;
  const uint32_t own = shared_base() + 4 * lane, next = shared_base() + 4 * (lane ^ 1);
  store_shared(own, float(lane));
  if (kWaits) __syncwarp();
  result[lane] = __uint_as_float(load_shared_word(next));
}

// What a lane has read another writes: after the warp has waited for all lanes, or after an exchange of values, which
// puts no access to memory after another, or at once.
template <bool kWaits, bool kExchanges>
__global__ void places(float* result) {
  const int lane = threadIdx.x;
  const uint32_t own = shared_base() + 4 * lane, next = shared_base() + 4 * (lane ^ 1);
  store_shared(own, float(lane));
  __syncwarp();
  float value = __uint_as_float(load_shared_word(next));
  if (kExchanges) value += shuffle_xor(value, 1);
  if (kWaits) __syncwarp();
  store_shared(own, value);
  result[lane] = value;
}

// The second warp takes what the first has left, after a barrier of the block or of a warp.
template <bool kOfBlock>
__global__ void warps(float* result) {
  const int thread = threadIdx.x;
  if (thread < 32) store_shared(shared_base() + 4 * thread, float(thread));
  if (kOfBlock) __syncthreads(); else __syncwarp();
  if (thread >= 32) result[thread - 32] = __uint_as_float(load_shared_word(shared_base() + 4 * (thread - 32)));
}

enum Fault {
  kNone,
  kNotMade,    // the barriers are used without a barrier of the block after their making
  kNoRoom,     // the second use does not wait until the first has been read
  kWrongRoom,  // it waits for a phase that has ended long ago
  kEarlyFull,  // one lane says that all is written when it has written its own
  kEarlyRoom,  // one lane says that all is read when it has read its own
  kOneWaits,   // one lane waits for the words, the others go on with it
  kInFlight,   // copies are not waited for before the arrival
  kLateCopies   // they are, but by each lane for its own alone
};

// The first warp hands words over to the second by barriers in shared memory, twice by the same place. A lane takes
// what its neighbour has written or copied in the background.
template <int kFault, bool kCopies, int kBarriersAt>
__global__ void hands_over(const float* from, float* result) {
  const int lane = threadIdx.x & 31;
  const uint32_t full = shared_base() + kBarriersAt, empty = full + 8;
  const uint32_t own = shared_base() + 16 * lane, next = shared_base() + 16 * (lane ^ 1);
  if (threadIdx.x == 0) {
    init_barrier(full, 1);
    init_barrier(empty, 1);
  }
  if (kFault != kNotMade) __syncthreads();
  for (int use = 0; use < 2; ++use) {
    if (threadIdx.x < 32) {
      if (kFault != kNoRoom && use > 0) wait_for_phase(empty, kFault == kWrongRoom ? 1 : 0);
      if (kCopies) copy_async(own, from, true);
      else store_shared(own, float(lane + 1));
      if (kCopies && kFault == kLateCopies) __syncwarp();
      if (kCopies && kFault != kInFlight) wait_for_all_copies();
      if (kFault != kEarlyFull && kFault != kLateCopies) __syncwarp();
      if (lane == 0) arrive(full);
      if (kCopies && kFault == kInFlight) wait_for_all_copies();
    } else {
      if (kFault != kOneWaits || lane == 0) wait_for_phase(full, use & 1);
      const float value = __uint_as_float(load_shared_word(next));
      if (kFault != kEarlyRoom) __syncwarp();
      if (lane == 0) arrive(empty);
      result[lane] = value;
    }
  }
}

// A copy in the background is used by the lane that asked for it, and by the others.
template <bool kWaits, bool kTogether>
__global__ void copies(const float* from, float* result) {
  const int lane = threadIdx.x;
  copy_async(shared_base() + 16 * lane, from, true);
  if (kWaits) wait_for_all_copies();
  if (kTogether) __syncwarp();
  result[lane] = __uint_as_float(load_shared_word(shared_base() + 16 * (lane ^ 1)));
}

// The copy is waited for, or nobody does.
template <bool kWaits>
__global__ void ends(const float* from, float* result) {
  copy_async(shared_base() + 16 * threadIdx.x, from, true);
  commit_copies();
  if (kWaits) wait_for_copies<0>();
  result[threadIdx.x] = 1.0f;
}

}  // namespace probe
"""

# Which of two that are in no order comes first here decides what is said.
RACE = "is read while it is written|is written while it is read|is written twice|is being copied to"
STUCK = f"{RACE}|threads wait for each other for ever"
CASES = {
    "neighbours<true>": "",
    "neighbours<false>": RACE,
    "places<true, true>": "",
    "places<true, false>": "",
    "places<false, true>": RACE,
    "places<false, false>": RACE,
    "warps<true>": "",
    "warps<false>": RACE,
    "hands_over<probe::kNone, false, 1024>": "",
    "hands_over<probe::kNotMade, false, 1024>": "that need not come after its making|no barrier was made",
    "hands_over<probe::kNoRoom, false, 1024>": STUCK,
    "hands_over<probe::kWrongRoom, false, 1024>": STUCK,
    "hands_over<probe::kEarlyFull, false, 1024>": RACE,
    "hands_over<probe::kEarlyRoom, false, 1024>": RACE,
    "hands_over<probe::kOneWaits, false, 1024>": RACE,
    "hands_over<probe::kNone, false, 64>": "is a barrier's",
    "hands_over<probe::kNone, true, 1024>": "",
    "hands_over<probe::kNoRoom, true, 1024>": STUCK,
    "hands_over<probe::kEarlyRoom, true, 1024>": RACE,
    "hands_over<probe::kInFlight, true, 1024>": RACE,
    "hands_over<probe::kLateCopies, true, 1024>": RACE,
    "copies<true, true>": "",
    "copies<false, true>": RACE,
    "copies<true, false>": RACE,
    "ends<true>": "",
    "ends<false>": "ends without having waited for its copies",
}
COPYING = ("hands_over", "copies", "ends")
KERNELS = {
    name: Kernel("probe.cu", f"probe::{name}", "PP" if name.startswith(COPYING) else "P", shared_bytes=2048)
    for name in CASES
}


@pytest.fixture(scope="module", autouse=True)
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The source stands beside those of the program."""
    folder = tmp_path_factory.mktemp("cuda")
    for file in emulator.kernels.CUDA.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "probe.cu").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.kernels, "CUDA", folder)
        yield


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("name", CASES)
def test_shared_memory_without_an_order_is_found_whatever_the_order(name: str, order: int) -> None:
    result = torch.zeros(32)
    given = (torch.ones(4), result) if name.startswith(COPYING) else (result,)
    threads = 64 if name.startswith(("warps", "hands_over")) else 32

    def run() -> None:
        with emulated(order=order):
            KERNELS[name](result, 1, threads, *given)

    if CASES[name]:
        with pytest.raises(RuntimeError, match=CASES[name]):
            run()
    else:
        run()
        assert result.any()
