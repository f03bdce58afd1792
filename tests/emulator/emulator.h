// CUDA kernels as plain C++: each thread of a block is a fiber, and what threads do together waits for all of them.
//
// The instructions that the kernels name in PTX are functions here; `tests/emulator/kernels.py` puts calls of these in the
// place of `asm` statements. Blocks run one after the other. Sums of a matrix product are exact before they are rounded,
// operands are cut or rounded as the tensor cores do.
//
// What is found: wrong indices, layouts and formulas, missing waits for copies (a copy is carried out when it is waited
// for), barriers that not all threads reach or whose memory is used for something else, shared memory read before it is
// written (it holds NaN) or beyond its end, a barrier that a thread uses without being after the one that made it, a copy
// that nobody waits for.
// Also shared memory that two threads use, one of them writing, with nothing that puts one after the other (`Races`).
// What is not: races in global memory, and those in arrays that a kernel declares __shared__ with a size. `order` turns
// the order of the threads round, or draws it at random, to see whether anything depends on it.
#ifndef EMULATOR_H
#define EMULATOR_H

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__
#define __grid_constant__

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// A meeting of some threads: what the last to come has computed is there for all.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  uint32_t address;
  const void* source;
  bool exists;
};

struct Thread {
  uint3 index;
  int number = 0;
  bool begun = false, done = false;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it waits
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> copies{1};  // groups, the last one open
};

struct Warp {
  Meeting meeting;
  std::map<uint32_t, Meeting> meetings;  // of the lanes of a mask
  uint64_t given[kLanes][8];
  uint64_t taken[kLanes][8];
};

// What is known to come before: of each warp, all that it did before its so-and-so-many-th synchronisation.
using Known = std::vector<uint32_t>;
inline void join(Known& into, const Known& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

constexpr uint32_t kBarrierBytes = 8;
struct Barrier {
  uint32_t expected = 0, pending = 0, phase = 0;
  Known arriving, complete;  // of those that arrive in this phase; of all phases that have ended
  int maker = 0;
  uint32_t made = 0;  // synchronisations of the maker's warp before
};

// Who has written and read each two bytes of shared memory last, and when: synchronisations of its warp before.
//
// Two lanes of a warp are put in an order by __syncwarp only, as PTX says, and not by an instruction that they carry out
// together, such as a shuffle or a matrix product. A thread that arrives at a barrier passes on what it knows to come
// before: of its own warp what was done before the warp's last synchronisation, and so nothing that another lane has done
// since. Nor does PTX say which lane reads or writes what of a matrix that is loaded or stored: it may be any.
struct Races {
  static constexpr int kNobody = -1, kMany = -2;
  static constexpr uint32_t kInFlight = UINT32_MAX;
  struct Access {
    int thread = kNobody;  // or, beyond the block's, the number of a matrix load or store
    int warp = 0;
    uint32_t time = 0;
  };
  int warps = 0, matrices = 0;
  std::vector<Access> written;  // [places]
  std::vector<Access> read;     // [places, warps]
  std::vector<uint32_t> times;  // of each warp
  std::vector<Known> known;     // by each thread

  void watch(size_t bytes, int threads) {
    warps = (threads + 31) / 32;
    written.resize(bytes / 2);
    read.resize(bytes / 2 * warps);
    times.assign(warps, 1);
    known.assign(threads, Known(warps, 1));
    for (int thread = 0; thread < threads; ++thread)
      for (int warp = 0; warp < warps; ++warp) known[thread][warp] = warp == thread / 32 ? 1 : 0;
  }

  // The threads from `first` to `last` go on after each other's past.
  void synchronise(int first, int last) {
    for (int warp = first / 32; 32 * warp < last; ++warp) ++times[warp];
    Known all(warps, 0);
    for (int thread = first; thread < last; ++thread) join(all, known[thread]);
    for (int warp = first / 32; 32 * warp < last; ++warp) all[warp] = times[warp];
    for (int thread = first; thread < last; ++thread) known[thread] = all;
  }

  // Null, or what it meets. `matrix`: the number of the load or store that it is part of, if it is one.
  const char* touch(uint32_t address, uint32_t bytes, int thread, bool writes, int matrix) {
    const int warp = thread / 32, own = matrix ? int(known.size()) + matrix : thread;
    for (uint32_t place = address / 2; place < (address + bytes + 1) / 2; ++place) {
      const Access& last = written[place];
      if (last.time == kInFlight) return "is being copied to";
      if (last.thread != kNobody && last.thread != own && last.time >= known[thread][last.warp])
        return writes ? "is written twice" : "is read while it is written";
      Access* reads = &read[size_t(place) * warps];
      if (writes) {
        for (int other = 0; other < warps; ++other)
          if (reads[other].thread != kNobody && reads[other].thread != own && reads[other].time >= known[thread][other])
            return "is written while it is read";
        written[place] = {own, warp, times[warp]};
      } else {
        Access& before = reads[warp];
        const bool alone = before.time < times[warp] || before.thread == own;
        before = {alone ? own : kMany, warp, times[warp]};
      }
    }
    return nullptr;
  }

  void copying(uint32_t address, uint32_t bytes, uint32_t time) {
    for (uint32_t place = address / 2; place < (address + bytes) / 2; ++place) written[place].time = time;
  }
};

struct Block {
  uint3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  std::vector<uint8_t> shared;
  std::vector<std::pair<uint32_t, Barrier>> barriers;
  uint32_t barriers_begin = UINT32_MAX, barriers_end = 0;  // all of them lie within
  Races races;
  int current = 0;
  uint64_t progress = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  std::string error;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}
inline Thread& self() { return block()->threads[block()->current]; }
inline int lane() { return self().number % kLanes; }
inline Warp& warp() { return block()->warps[self().number / kLanes]; }
inline int lanes_of_warp() {
  const int first = self().number / kLanes * kLanes, all = int(block()->threads.size());
  return all - first < kLanes ? all - first : kLanes;
}

inline void yield() {
  // Not swapcontext, which asks the system each time.
  if (!_setjmp(self().place)) _longjmp(block()->scheduler, 1);
}

// Waits until `count` threads are here; the last runs `together`.
template <class Together>
void meet(Meeting& meeting, int count, Together together) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    together();
    meeting.arrived = 0;
    ++meeting.generation;
    ++block()->progress;
  } else {
    while (meeting.generation == generation) yield();
  }
}

inline void run_thread() {
  try {
    block()->body();
    for (const auto& group : self().copies)
      if (!group.empty()) fail("a thread ends without having waited for its copies");
  } catch (const std::exception& error) {
    if (block()->error.empty()) block()->error = error.what();
  }
  self().done = true;
  ++block()->progress;
  yield();
}

inline void run_block(Block& b, int order) {
  block() = &b;
  const int count = int(b.threads.size());
  for (int i = 0; i < count; ++i) {
    Thread& thread = b.threads[i];
    thread.number = i;
    thread.index = {uint32_t(i) % b.size.x, uint32_t(i) / b.size.x % b.size.y, uint32_t(i) / (b.size.x * b.size.y)};
    thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  auto resume = [&](int number) {
    b.current = number;
    Thread& thread = b.threads[number];
    if (thread.done || !b.error.empty()) return false;
    if (_setjmp(b.scheduler)) return true;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
    return true;
  };
  uint32_t random = uint32_t(order);
  for (;;) {
    const uint64_t before = b.progress;
    // From 2 on: some warps are drawn, which run on for a while, before every thread has its turn.
    for (int drawn = 0; order > 1 && drawn < int(b.warps.size()); ++drawn) {
      random = random * 1664525u + 1013904223u;
      const int first = int((random >> 16) % b.warps.size()) * kLanes;
      for (uint32_t turns = random >> 26; turns > 0; --turns)
        for (int i = first; i < first + kLanes && i < count; ++i) resume(i);
    }
    int left = 0;
    for (int i = 0; i < count; ++i) left += resume(order == 1 ? count - 1 - i : i);
    if (!b.error.empty()) fail(b.error);
    if (left == 0) return;
    if (b.progress == before) fail("threads wait for each other for ever");
  }
}

// --- what threads of a warp do together ------------------------------------------------------------------------------

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The lanes of `mask` exchange values; others may have ended.
template <class T, class From>
T exchange(uint32_t mask, T value, From source) {
  Warp& w = warp();
  const int own = lane(), named = __builtin_popcount(mask);
  w.given[own][0] = to_bits(value);
  meet(w.meetings[mask], named < lanes_of_warp() ? named : lanes_of_warp(), [&] {
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) w.taken[l][0] = w.given[l][0];
  });
  const int from = source(own);
  const uint64_t bits = from >= 0 && from < kLanes ? w.taken[from][0] : to_bits(value);
  return from_bits<T>(bits);
}

// --- shared memory ---------------------------------------------------------------------------------------------------

inline uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  Block& b = *block();
  if (address % bytes) fail("shared memory: address " + std::to_string(address) + " is no multiple of " + std::to_string(bytes));
  if (address + bytes > b.shared.size())
    fail("shared memory: address " + std::to_string(address) + " is beyond " + std::to_string(b.shared.size()));
  if (address < b.barriers_end && address + bytes > b.barriers_begin)
    for (const auto& entry : b.barriers)
      if (address < entry.first + kBarrierBytes && address + bytes > entry.first)
        fail("shared memory: address " + std::to_string(address) + " is a barrier's");
  return b.shared.data() + address;
}
inline void touch(uint32_t address, uint32_t bytes, int thread, bool writes, int matrix = 0) {
  if (const char* met = block()->races.touch(address, bytes, thread, writes, matrix))
    fail("shared memory: address " + std::to_string(address) + " " + met + ", seen by thread " + std::to_string(thread));
}
// By a thread: the one that runs, if none is named.
template <class T>
T read_shared(uint32_t address, int thread = block()->current, int matrix = 0) {
  T value;
  std::memcpy(&value, shared_at(address, sizeof(T)), sizeof(T));
  touch(address, sizeof(T), thread, false, matrix);
  return value;
}
template <class T>
void write_shared(uint32_t address, T value, int thread = block()->current, int matrix = 0) {
  std::memcpy(shared_at(address, sizeof(T)), &value, sizeof(T));
  touch(address, sizeof(T), thread, true, matrix);
}

inline void carry_out(const std::vector<Copy>& group) {
  Races& races = block()->races;
  for (const Copy& copy : group) {
    uint8_t* to = shared_at(copy.address, 16);
    races.copying(copy.address, 16, races.times[block()->current / kLanes]);
    if (copy.exists)
      std::memcpy(to, copy.source, 16);
    else
      std::memset(to, 0, 16);
  }
}
inline void wait_copies(size_t pending, bool open_too) {
  auto& groups = self().copies;
  while (groups.size() - 1 > pending) {
    carry_out(groups.front());
    groups.erase(groups.begin());
  }
  if (open_too) {
    carry_out(groups.back());
    groups.back().clear();
  }
}

inline float bf16(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  return from_bits<float>(bits);
}
inline uint32_t round_to_bf16(float value) {
  uint32_t bits = uint32_t(to_bits(value));
  if (std::isnan(value)) return 0x7fff;
  bits += 0x7fff + ((bits >> 16) & 1);
  return bits >> 16;
}

inline Barrier& barrier_at(uint32_t address) {
  const int thread = block()->current;
  for (auto& [at, barrier] : block()->barriers)
    if (at == address) {
      if (barrier.maker != thread && barrier.made >= block()->races.known[thread][barrier.maker / kLanes])
        fail("the barrier at " + std::to_string(address) + " is used by a thread that need not come after its making");
      return barrier;
    }
  fail("no barrier was made at " + std::to_string(address));
}

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
T unpack(const char* buffer, size_t& end) {
  end = (end + alignof(T) - 1) / alignof(T) * alignof(T);
  T value;
  std::memcpy(&value, buffer + end, sizeof(T));
  end += sizeof(T);
  return value;
}

template <class... P>
void launch(void (*kernel)(P...), const uint32_t* grid, const uint32_t* size, uint32_t shared_bytes, const char* buffer,
            int order) {
  size_t end = 0;
  std::tuple<P...> parameters{unpack<P>(buffer, end)...};
  for (uint32_t z = 0; z < grid[2]; ++z)
    for (uint32_t y = 0; y < grid[1]; ++y)
      for (uint32_t x = 0; x < grid[0]; ++x) {
        Block b;
        b.index = {x, y, z};
        b.size = {size[0], size[1], size[2]};
        b.grid = {grid[0], grid[1], grid[2]};
        b.threads = std::vector<Thread>(size_t(size[0]) * size[1] * size[2]);
        b.warps = std::vector<Warp>((b.threads.size() + kLanes - 1) / kLanes);
        b.shared.assign(shared_bytes, 0xff);
        b.races.watch(shared_bytes, int(b.threads.size()));
        b.body = [&] { std::apply(kernel, parameters); };
        run_block(b, order);
      }
}

// Null, or what went wrong.
template <class... P>
const char* launched(void (*kernel)(P...), const uint32_t* grid, const uint32_t* size, uint32_t shared_bytes,
                     const char* buffer, int order) {
  static std::string error;
  try {
    launch(kernel, grid, size, shared_bytes, buffer, order);
  } catch (const std::exception& found) {
    error = found.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace emulated

#define threadIdx (emulated::self().index)
#define blockIdx (emulated::block()->index)
#define blockDim (emulated::block()->size)
#define gridDim (emulated::block()->grid)

inline float __uint_as_float(uint32_t bits) { return emulated::from_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return uint32_t(emulated::to_bits(value)); }
inline float __int_as_float(int32_t bits) { return emulated::from_bits<float>(uint32_t(bits)); }
inline int32_t __float_as_int(float value) { return int32_t(emulated::to_bits(value)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float x, float y) { volatile float product = x * y; return product; }
inline float __fadd_rn(float x, float y) { volatile float sum = x + y; return sum; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }
template <class T> void __stcg(T* at, T value) { *at = value; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline uint32_t __cvta_generic_to_shared(const void* at) {
  return uint32_t(static_cast<const uint8_t*>(at) - emulated::block()->shared.data());
}

inline void __syncthreads() {
  const int threads = int(emulated::block()->threads.size());
  emulated::Races& races = emulated::block()->races;
  emulated::meet(emulated::block()->meeting, threads, [&] {
    races.synchronise(0, threads);
  });
}
inline void __syncwarp(uint32_t = 0xffffffffu) {
  const int first = emulated::self().number - emulated::lane(), lanes = emulated::lanes_of_warp();
  emulated::Races& races = emulated::block()->races;
  emulated::meet(emulated::warp().meeting, lanes, [&] {
    races.synchronise(first, first + lanes);
  });
}
template <class T> T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return emulated::exchange(mask, value, [=](int own) { return own / width * width + from % width; });
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int step) {
  return emulated::exchange(mask, value, [=](int own) { return own ^ step; });
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32) {
  return emulated::exchange(mask, value, [=](int own) { return own % width + distance < width ? own + distance : own; });
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32) {
  return emulated::exchange(mask, value, [=](int own) { return own % width >= distance ? own - distance : own; });
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  emulated::Warp& w = emulated::warp();
  w.given[emulated::lane()][0] = predicate != 0;
  emulated::meet(w.meeting, emulated::lanes_of_warp(), [&] {
    uint64_t found = 0;
    for (int l = 0; l < emulated::lanes_of_warp(); ++l) found |= w.given[l][0] << l;
    for (int l = 0; l < 32; ++l) w.taken[l][0] = found;
  });
  return uint32_t(w.taken[emulated::lane()][0]);
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T> T atomicAdd(T* at, T value) { T old = *at; *at = old + value; return old; }
inline float atomicMax(float* at, float value) { float old = *at; if (value > old) *at = value; return old; }

// --- PTX -------------------------------------------------------------------------------------------------------------

inline void ptx_st_shared_b32(uint32_t at, uint32_t x) { emulated::write_shared(at, x); }
inline void ptx_st_shared_b16(uint32_t at, uint16_t x) { emulated::write_shared(at, x); }
inline void ptx_st_shared_f32(uint32_t at, float x) { emulated::write_shared(at, x); }
inline void ptx_st_shared_v2_f32(uint32_t at, float x, float y) { emulated::write_shared(at, float2{x, y}); }
inline void ptx_st_shared_v4_f32(uint32_t at, float x, float y, float z, float w) {
  emulated::write_shared(at, float4{x, y, z, w});
}
inline void ptx_st_shared_v4_b32(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  emulated::write_shared(at, uint4{x, y, z, w});
}
inline void ptx_ld_shared_b32(uint32_t& x, uint32_t at) { x = emulated::read_shared<uint32_t>(at); }
inline void ptx_ld_shared_f32(float& x, uint32_t at) { x = emulated::read_shared<float>(at); }
inline void ptx_ld_shared_v2_f32(float& x, float& y, uint32_t at) {
  const float2 v = emulated::read_shared<float2>(at);
  x = v.x, y = v.y;
}
inline void ptx_ld_shared_v4_f32(float& x, float& y, float& z, float& w, uint32_t at) {
  const float4 v = emulated::read_shared<float4>(at);
  x = v.x, y = v.y, z = v.z, w = v.w;
}
inline void ptx_ld_shared_v4_b32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t at) {
  const uint4 v = emulated::read_shared<uint4>(at);
  x = v.x, y = v.y, z = v.z, w = v.w;
}

namespace emulated {

// Row `row` of 8x8 matrix `matrix` is at the address that lane 8 * matrix + row gave.
inline void move_matrices(uint32_t (&m)[4], uint32_t at, bool transposed, bool stores) {
  Warp& w = warp();
  const int own = lane(), own_first = self().number - own;
  w.given[own][0] = at;
  for (int i = 0; i < 4; ++i) w.given[own][1 + i] = m[i];
  meet(w.meeting, kLanes, [&] {
    const int number = ++block()->races.matrices;
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < 4; ++i) {
        uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
          const int row = transposed ? 2 * (l % 4) + half : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + half;
          const uint32_t address = uint32_t(w.given[8 * i + row][0]);
          shared_at(address, 16);
          const int thread = own_first + l;
          if (stores)
            write_shared(address + 2 * column, uint16_t(w.given[l][1 + i] >> (16 * half)), thread, number);
          else
            word |= uint32_t(read_shared<uint16_t>(address + 2 * column, thread, number)) << (16 * half);
        }
        w.taken[l][i] = word;
      }
  });
  if (!stores)
    for (int i = 0; i < 4; ++i) m[i] = uint32_t(w.taken[own][i]);
}

// c [16, 8] += a [16, k] b [k, 8]; `in_a` and `in_b` find an operand among what the lanes gave.
template <class InA, class InB>
void multiply(float (&c)[4], const uint32_t* operands, int count, int depth, InA in_a, InB in_b) {
  Warp& w = warp();
  const int own = lane();
  for (int i = 0; i < count; ++i) w.given[own][i] = operands[i];
  float sums[4];
  meet(w.meeting, kLanes, [&] {
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < count; ++i) w.taken[l][i] = w.given[l][i];
  });
  for (int e = 0; e < 4; ++e) {
    const int row = own / 4 + (e >= 2 ? 8 : 0), column = 2 * (own % 4) + (e & 1);
    double sum = c[e];
    for (int k = 0; k < depth; ++k) sum += double(in_a(w, row, k)) * double(in_b(w, k, column));
    sums[e] = float(sum);
  }
  for (int e = 0; e < 4; ++e) c[e] = sums[e];
}

inline float cut_to_tf32(uint64_t bits) { return from_bits<float>(bits & 0xffffe000u); }

}  // namespace emulated

inline void ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t at) {
  uint32_t m[4] = {};
  emulated::move_matrices(m, at, false, false);
  a = m[0], b = m[1], c = m[2], d = m[3];
}
inline void ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                               uint32_t at) {
  uint32_t m[4] = {};
  emulated::move_matrices(m, at, true, false);
  a = m[0], b = m[1], c = m[2], d = m[3];
}
inline void ptx_stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t m[4] = {a, b, c, d};
  emulated::move_matrices(m, at, false, true);
}
inline void ptx_stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                                               uint32_t d) {
  uint32_t m[4] = {a, b, c, d};
  emulated::move_matrices(m, at, true, true);
}
inline void ptx_movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& result, uint32_t fragment) {
  emulated::Warp& w = emulated::warp();
  const int own = emulated::lane();
  w.given[own][0] = fragment;
  emulated::meet(w.meeting, 32, [&] {
    for (int l = 0; l < 32; ++l) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = l / 4, column = 2 * (l % 4) + half;  // of the result; the source is the other way round
        const uint64_t source = w.given[4 * column + row / 2][0];
        word |= uint32_t((source >> (16 * (row & 1))) & 0xffff) << (16 * half);
      }
      w.taken[l][0] = word;
    }
  });
  result = uint32_t(w.taken[own][0]);
}

inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& c0, float& c1, float& c2, float& c3,
                                                                    uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                                    uint32_t b0, uint32_t b1) {
  float c[4] = {c0, c1, c2, c3};
  const uint32_t given[6] = {a0, a1, a2, a3, b0, b1};
  emulated::multiply(
      c, given, 6, 16,
      [](emulated::Warp& w, int row, int k) {
        const uint64_t word = w.taken[row % 8 * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)];
        return emulated::bf16(uint32_t(word), k & 1);
      },
      [](emulated::Warp& w, int k, int column) {
        return emulated::bf16(uint32_t(w.taken[column * 4 + k % 8 / 2][4 + (k >= 8)]), k & 1);
      });
  c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
}
inline void ptx_mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32(float& c0, float& c1, float& c2, float& c3,
                                                                   uint32_t a0, uint32_t a1, uint32_t b0) {
  float c[4] = {c0, c1, c2, c3};
  const uint32_t given[3] = {a0, a1, b0};
  emulated::multiply(
      c, given, 3, 8,
      [](emulated::Warp& w, int row, int k) {
        return emulated::bf16(uint32_t(w.taken[row % 8 * 4 + k / 2][row >= 8]), k & 1);
      },
      [](emulated::Warp& w, int k, int column) {
        return emulated::bf16(uint32_t(w.taken[column * 4 + k / 2][2]), k & 1);
      });
  c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
}
inline void ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(float& c0, float& c1, float& c2, float& c3,
                                                                   uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                                   uint32_t b0, uint32_t b1) {
  float c[4] = {c0, c1, c2, c3};
  const uint32_t given[6] = {a0, a1, a2, a3, b0, b1};
  emulated::multiply(
      c, given, 6, 8,
      [](emulated::Warp& w, int row, int k) {
        return emulated::cut_to_tf32(w.taken[row % 8 * 4 + k % 4][(row >= 8) + 2 * (k >= 4)]);
      },
      [](emulated::Warp& w, int k, int column) {
        return emulated::cut_to_tf32(w.taken[column * 4 + k % 4][4 + (k >= 4)]);
      });
  c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
}

inline void ptx_cp_async_cg_shared_global(uint32_t at, const void* source, int bytes) {
  emulated::shared_at(at, 16);
  emulated::touch(at, 16, emulated::block()->current, true);
  emulated::block()->races.copying(at, 16, emulated::Races::kInFlight);
  emulated::self().copies.back().push_back({at, source, bytes == 16});
}
inline void ptx_cp_async_commit_group() { emulated::self().copies.emplace_back(); }
inline void ptx_cp_async_wait_group(int pending) { emulated::wait_copies(size_t(pending), false); }
inline void ptx_cp_async_wait_all() { emulated::wait_copies(0, true); }
inline void ptx_prefetch_global_L2(const void*) {}

inline void ptx_mbarrier_init_shared_b64(uint32_t at, uint32_t count) {
  emulated::shared_at(at, emulated::kBarrierBytes);
  emulated::Block& block = *emulated::block();
  const emulated::Known none(block.races.warps, 0);
  block.barriers.push_back({at, {count, count, 0, none, none, block.current, block.races.times[block.current / 32]}});
  block.barriers_begin = std::min(block.barriers_begin, at);
  block.barriers_end = std::max(block.barriers_end, at + emulated::kBarrierBytes);
}
inline void ptx_mbarrier_arrive_shared_b64(uint32_t at) {
  emulated::Barrier& barrier = emulated::barrier_at(at);
  ++emulated::block()->progress;
  const emulated::Races& races = emulated::block()->races;
  emulated::join(barrier.arriving, races.known[emulated::block()->current]);
  if (--barrier.pending == 0) {
    barrier.pending = barrier.expected, barrier.phase ^= 1;
    barrier.complete = barrier.arriving;
  }
}
inline void ptx_mbarrier_try_wait_parity_shared_b64(uint32_t& done, uint32_t at, uint32_t parity) {
  const emulated::Barrier& barrier = emulated::barrier_at(at);
  emulated::Races& races = emulated::block()->races;
  done = barrier.phase != (parity & 1);
  if (done)
    emulated::join(races.known[emulated::block()->current], barrier.complete);
  else
    emulated::yield();
}
inline void ptx_mbarrier_test_wait_parity_shared_b64(uint32_t& done, uint32_t at, uint32_t parity) {
  ptx_mbarrier_try_wait_parity_shared_b64(done, at, parity);
}

inline void ptx_cvt_rna_tf32_f32(uint32_t& y, float x) { y = (uint32_t(emulated::to_bits(x)) + 0x1000u) & 0xffffe000u; }
inline void ptx_cvt_rna_tf32_f32(float& y, float x) {
  uint32_t bits;
  ptx_cvt_rna_tf32_f32(bits, x);
  y = emulated::from_bits<float>(bits);
}
inline void ptx_ex2_approx_ftz_f32(float& y, float x) { y = std::exp2(x); }
inline void ptx_rcp_approx_ftz_f32(float& y, float x) { y = 1.0f / x; }
inline void ptx_tanh_approx_f32(float& y, float x) { y = std::tanh(x); }
inline void ptx_min_NaN_f32(float& y, float a, float b) { y = std::isnan(a) || std::isnan(b) ? NAN : (a < b ? a : b); }
inline void ptx_cvt_rn_bf16x2_f32(uint32_t& y, float high, float low) {
  y = emulated::round_to_bf16(high) << 16 | emulated::round_to_bf16(low);
}

#endif
