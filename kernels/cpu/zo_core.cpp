// The C entry points: arguments, instruction set, threads. What a pass computes is in pass.cpp.
#include <dlfcn.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "pass.h"

namespace {

// Below this many elements a thread's start costs more than it saves (about 20 us against 1 ns an element).
constexpr int64_t MIN_PER_THREAD = 1 << 16;

// Copies of more bytes than this are made past the caches, which they would leave before they are read.
constexpr int64_t PAST_CACHES = 8 << 20;

// The OpenMP runtime that the process has, torch's say: its waiting threads spin, so threads of our own beside them would
// fight for the cores. A child of fork() has the runtime without its threads and must leave it alone.
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
const Parallel gomp_parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
const pid_t loaded_in = getpid();

// Calls work(k) for k = 0 .. n - 1 on up to n threads, this one among them; whatever threads there are take what is left.
template <class Work>
void on_threads(int64_t n, const Work &work) {
  struct Job {
    const Work &work;
    int64_t n;
    std::atomic<int64_t> next{0};
    static void take(void *self) {
      Job &job = *(Job *)self;
      for (int64_t k; (k = job.next++) < job.n;) job.work(k);
    }
  } job{work, n};
  std::vector<std::thread> others;
  if (n > 1 && gomp_parallel && getpid() == loaded_in)
    gomp_parallel(Job::take, &job, (unsigned)n, 0);
  else
    try {
      for (int64_t k = 1; k < n; k++) others.emplace_back(Job::take, &job);
    } catch (const std::system_error &) {
    }
  Job::take(&job);
  for (std::thread &t : others) t.join();
}

const Variant *variant_of(int isa) {
#if defined(__x86_64__)
  if (isa == ZO_ISA_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &zo_avx512;
  if (isa == ZO_ISA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &zo_avx2;
#endif
  return isa == ZO_ISA_PORTABLE ? &zo_portable : nullptr;
}

int best_isa() {
  int isa = ZO_ISA_AVX512;
  while (!variant_of(isa)) isa--;
  return isa;
}

std::atomic<int> current_isa{best_isa()};

bool finite(const float *x, int64_t n) {
  bool all = true;
  for (int64_t i = 0; x && i < n; i++) all &= std::isfinite(x[i]);
  return all;
}

constexpr int64_t MAX_INDEX = (int64_t)1 << 56;  // of an element; block numbers have 56 bits

int64_t bytes(int32_t dtype, int64_t numel) { return numel * (dtype == ZO_FLOAT32 ? 4 : 2); }

bool overlap(const void *a, int32_t a_dtype, const void *b, int32_t b_dtype, int64_t numel) {
  const char *x = (const char *)a, *y = (const char *)b;
  return x < y + bytes(b_dtype, numel) && y < x + bytes(a_dtype, numel);
}

// src and dst must be the same memory in the same dtype, or disjoint.
bool wrong_memory(const zo_tensor &t) {
  if (t.src == t.dst) return t.numel && t.src_dtype != t.dst_dtype;
  return overlap(t.src, t.src_dtype, t.dst, t.dst_dtype, t.numel);
}

bool valid_dtype(int32_t d) { return d >= ZO_FLOAT32 && d <= ZO_FLOAT16; }

bool valid_scales(const zo_tensor &t) {
  return t.column_scale ? t.columns > 0 && !t.hessian : !t.row_scale;
}

bool valid_residual(const zo_tensor &t) {
  if (t.residual_bits == 0) return true;
  return (t.residual_bits == 8 || t.residual_bits == 16) && t.src_dtype != ZO_FLOAT32 && (!t.numel || t.residual);
}

// How a tensor is cut into tiles. They end at multiples of ZO_TILE of the element index, wherever it starts; those of factored
// noise, where rows are wide and not few, are blocks of equal width that start at multiples of ZO_HEIGHT and 128.
struct Tiles {
  int64_t count = 0, first = 0;   // first: number of the first tile or row of blocks
  int64_t across = 0, width = 0;  // blocks in a row, or 0, and columns of one

  Tiles(const zo_pass &p, const zo_tensor &t) {
    if (!t.numel) return;
    const int64_t last = t.offset + t.numel - 1;
    const bool blocks = p.distribution == ZO_FACTORED && t.noise_columns >= ZO_WIDTH / 4 && t.numel / t.noise_columns >= ZO_ROWS / 2;
    const int64_t size = blocks ? ZO_HEIGHT * t.noise_columns : ZO_TILE;
    if (blocks) {
      across = (t.noise_columns + ZO_WIDTH - 1) / ZO_WIDTH;
      width = ((t.noise_columns + across - 1) / across + 127) & ~(int64_t)127;
    }
    first = t.offset / size;
    count = (last / size - first + 1) * (blocks ? across : 1);
  }

  void place(Tile &x, int64_t n, int64_t numel) const {  // the n-th of them
    const int64_t start = (first + n) * ZO_TILE - x.offset;
    x.block = across != 0;
    x.begin = x.block || start < 0 ? 0 : start;
    x.end = x.block || start + ZO_TILE > numel ? numel : start + ZO_TILE;
    if (x.block) x.row = (first + n / across) * ZO_HEIGHT, x.column = n % across * width, x.width = width;
  }
};

// Rows and columns are numbered by 47 bits: 7 in a Philox block, 40 in its number.
bool valid_matrix(const zo_tensor &t) {
  const int64_t most = (int64_t)1 << 47;
  return t.noise_columns >= 0 && t.noise_columns <= most &&
         (!t.noise_columns || !t.numel || (t.offset + t.numel - 1) / t.noise_columns < most);
}

// Whether the pass changes anything of tensor i: layers that a mask leaves out cost nothing.
bool touches(const zo_pass &p, const zo_tensor &t, int64_t i, int64_t n) {
  if (t.src != t.dst || (p.decay && p.decay[i] != 0) || (p.curvature && p.smoothing[i] != 0)) return true;
  for (int64_t k = 0; k < p.n_streams; k++) {
    const int64_t at = k * n + i;
    if (p.coeffs[at] != 0 || (p.curvature && (p.restore[at] != 0 || p.curvature[at] != 0))) return true;
  }
  return false;
}

int check(const zo_pass &p, const zo_tensor *tensors, int64_t n_tensors) {
  if (p.n_streams < 0 || (p.n_streams && n_tensors && (!p.streams || !p.coeffs)) || p.threads < 1 ||
      p.distribution < ZO_GAUSSIAN || p.distribution > ZO_FACTORED ||
      (p.distribution == ZO_FACTORED && (p.rank < 1 || p.rank > ZO_MAX_RANK || p.curvature)) ||
      (p.rounding != ZO_NEAREST && p.rounding != ZO_STOCHASTIC) || (p.curvature && (!p.restore || !p.smoothing)) ||
      (p.restore && !p.curvature) || (p.squares && (p.curvature || p.distribution != ZO_GAUSSIAN)) || (p.curvature && !(0 < p.hessian_min && p.hessian_min <= p.hessian_max)))
    return ZO_BAD_ARGUMENT;
  for (int64_t i = 0; i < n_tensors; i++) {
    const zo_tensor &t = tensors[i];
    if (t.numel < 0 || t.offset < 0 || t.numel > MAX_INDEX || t.offset > MAX_INDEX || !valid_dtype(t.src_dtype) || !valid_dtype(t.dst_dtype) ||
        (t.numel && (!t.src || !t.dst)) || (p.curvature && t.numel && !t.hessian) || (p.squares && (t.hessian || t.column_scale)) ||
        !valid_residual(t) || !valid_scales(t) || wrong_memory(t) || (p.distribution == ZO_FACTORED && !valid_matrix(t)))
      return ZO_BAD_ARGUMENT;
  }
  return ZO_OK;
}

bool finite(const zo_pass &p, int64_t n_tensors) {
  const int64_t matrix = p.n_streams * n_tensors;
  return finite(p.coeffs, matrix) && finite(p.restore, matrix) && finite(p.curvature, matrix) && finite(p.squares, matrix) &&
         finite(p.decay, n_tensors) && finite(p.curvature ? p.smoothing : nullptr, n_tensors);
}

// The passes one after the other, all of them over a tile before the next tile.
int run(const zo_pass *passes, int64_t n_passes, const zo_tensor *tensors, int64_t n_tensors, int64_t *counters) {
  for (int64_t s = 0; s < n_passes; s++)
    if (check(passes[s], tensors, n_tensors) != ZO_OK) return ZO_BAD_ARGUMENT;
  std::vector<const zo_pass *> steps;
  for (int64_t s = 0; s < n_passes; s++)
    if (finite(passes[s], n_tensors))
      steps.push_back(&passes[s]);
    else
      counters[0]++;

  std::vector<int64_t> first_tile(1, 0), first_element(1, 0);  // of each tensor, in one row of all that changes
  std::vector<Tiles> cut;
  int64_t copied = 0;
  for (int64_t i = 0; i < n_tensors; i++) {
    bool touched = false;
    for (size_t s = 0; s < steps.size() && !touched; s++) touched = touches(*steps[s], tensors[i], i, n_tensors);
    cut.emplace_back(passes[0], tensors[i]);
    first_tile.push_back(first_tile.back() + (touched ? cut[i].count : 0));
    first_element.push_back(first_element.back() + (touched ? tensors[i].numel : 0));
    copied += tensors[i].src != tensors[i].dst ? bytes(tensors[i].dst_dtype, tensors[i].numel) : 0;
  }
  const int64_t elements = first_element.back();
  const auto tile_of = [&](int64_t e) {  // in which element e is, about: tiles of different tensors differ in size
    if (e == elements) return first_tile.back();
    const size_t i = std::upper_bound(first_element.begin(), first_element.end(), e) - first_element.begin() - 1;
    const double part = (double)(e - first_element[i]) / (double)tensors[i].numel;
    return first_tile[i] + (int64_t)(part * (double)(first_tile[i + 1] - first_tile[i]));
  };
  const Variant &variant = *variant_of(current_isa);

  // All threads or one: OpenMP ends the threads that a smaller team leaves out, and starts them again.
  const int64_t work = elements * (int64_t)steps.size();
  const int64_t threads = work >= 2 * MIN_PER_THREAD ? passes[0].threads : 1;
  on_threads(threads, [&](int64_t k) {
    const int64_t from = tile_of(elements / threads * k), to = tile_of(k + 1 < threads ? elements / threads * (k + 1) : elements);
    int64_t i = 0;
    for (int64_t tile = from; tile < to; tile++) {
      while (first_tile[i + 1] <= tile) i++;
      const zo_tensor &t = tensors[i];
      Tile x = {};
      x.src = t.src, x.dst = t.dst, x.hessian = t.hessian, x.residual = t.residual, x.offset = t.offset;
      x.row_scale = t.row_scale, x.column_scale = t.column_scale, x.columns = t.columns;
      x.noise_columns = t.noise_columns;
      cut[i].place(x, tile - first_tile[i], t.numel);
      x.index = i, x.n_tensors = n_tensors, x.id = t.id, x.src_dtype = t.src_dtype, x.dst_dtype = t.dst_dtype;
      x.residual_bits = t.residual_bits, x.past = t.src != t.dst && copied > PAST_CACHES;
      const bool keeps_all = t.src == t.dst && t.residual_bits == 16;  // what rounding takes: nothing random about it
      int64_t saturated = 0;
      for (const zo_pass *step : steps) {
        const zo_pass &p = *step;
        if (!touches(p, t, i, n_tensors)) continue;
        x.stochastic = p.rounding == ZO_STOCHASTIC && t.dst_dtype != ZO_FLOAT32 && !keeps_all;
        x.curvature = p.curvature != nullptr, x.squares = p.squares != nullptr;
        x.keep = 1.0f - (p.decay ? p.decay[i] : 0.0f);
        x.remain = 1.0f - (p.curvature ? p.smoothing[i] : 0.0f);
        x.hessian_min = p.hessian_min, x.hessian_max = p.hessian_max;
        saturated += variant.run_tile(p, x);
      }
      if (saturated) __atomic_fetch_add(&counters[1 + i], saturated, __ATOMIC_RELAXED);
    }
#if defined(__SSE2__)
    _mm_sfence();  // what went past the caches is there before this thread says that it is done
#endif
  });
  return ZO_OK;
}

}  // namespace

extern "C" int zo_run(const zo_pass *pass, const zo_tensor *tensors, int64_t n_tensors, int64_t *counters) {
  if (!pass || !counters || n_tensors < 0 || (n_tensors && !tensors)) return ZO_BAD_ARGUMENT;
  return run(pass, 1, tensors, n_tensors, counters);
}

extern "C" int zo_run_steps(const zo_pass *passes, int64_t n_passes, const zo_tensor *tensors, int64_t n_tensors,
                            int64_t *counters) {
  if (n_passes < 0 || (n_passes && !passes) || !counters || n_tensors < 0 || (n_tensors && !tensors))
    return ZO_BAD_ARGUMENT;
  for (int64_t i = 0; i < n_tensors; i++)
    if (tensors[i].src != tensors[i].dst) return ZO_BAD_ARGUMENT;
  for (int64_t s = 1; s < n_passes; s++)
    if (passes[s].distribution != passes[0].distribution) return ZO_BAD_ARGUMENT;
  return n_passes ? run(passes, n_passes, tensors, n_tensors, counters) : ZO_OK;
}

extern "C" int zo_philox(uint64_t seed, uint32_t domain, uint32_t tensor_id, uint32_t stream, uint64_t block,
                         int64_t n_blocks, int32_t rounds, uint32_t *words) {
  if (n_blocks < 0 || (n_blocks && !words) || (rounds != 7 && rounds != 10) || domain > 0xff) return ZO_BAD_ARGUMENT;
  variant_of(current_isa)->words(words, block, n_blocks, domain, seed, tensor_id, stream, rounds);
  return ZO_OK;
}

extern "C" int zo_signs(uint64_t seed, uint32_t domain, uint32_t tensor_id, const uint32_t *streams, int64_t n_streams,
                        int32_t rank, int64_t n, float *signs) {
  if (n_streams < 0 || rank < 0 || rank > ZO_MAX_RANK || n < 0 || n > (int64_t)1 << 47 || domain > 0xff ||
      (n_streams && rank && n && (!streams || !signs)))
    return ZO_BAD_ARGUMENT;
  for (int64_t k = 0; k < n_streams; k++)
    for (int32_t q = 0; q < rank; q++)
      variant_of(current_isa)->signs(signs + (k * rank + q) * n, n, domain, seed, tensor_id, streams[k], q);
  return ZO_OK;
}

extern "C" int zo_isa_available(int isa) { return variant_of(isa) != nullptr; }
extern "C" int zo_isa_get(void) { return current_isa; }
extern "C" int zo_isa_set(int isa) {
  if (!variant_of(isa)) return ZO_BAD_ARGUMENT;
  current_isa = isa;
  return ZO_OK;
}
extern "C" int zo_abi_version(void) { return ZO_ABI_VERSION; }
