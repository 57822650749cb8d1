// The pass over one tile of one tensor. Compiled once an instruction set, with ZO_VARIANT its name.
#include <memory>
#include <type_traits>

#include "factored.h"

namespace {

// ---- storage formats: float32 in registers, the format's bits in memory -------------------------------------

// `extended` is the pattern of a magnitude with 16 more bits than the format keeps, `contracted` the way back to
// float32 (docs/noise.md). KEPT: bytes of an element's residual; RANDOM: whether rounding can take random bits.
struct Float32 {
  using Bits = uint32_t;
  static constexpr float MAX = 0x1.fffffep127f;
  static constexpr int KEPT = 0;
  static constexpr bool RANDOM = false;
  static ZO_INLINE vf get(const Bits *p, const char *) { return load<vf>(p); }
  template <bool PAST> static ZO_INLINE void put(Bits *p, vf x, vu, bool, char *) { write<PAST>(p, x); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr float MAX = 0x1.fep127f;
  static constexpr int KEPT = 0, INFINITE = 0x7f800000;
  static constexpr bool RANDOM = true;
  static ZO_INLINE vu extended(vu magnitude) { return magnitude; }
  static ZO_INLINE vu contracted(vu u) { return u; }
  static ZO_INLINE vf get(const Bits *p, const char *) { return as_f(widen(load<vh>(p)) << 16); }
  template <bool PAST> static ZO_INLINE void put(Bits *p, vf x, vu random, bool stochastic, char *) {
    const vu b = as_u(x);
    write<PAST>(p, high_halves(stochastic ? b + random : nearest_high(b)));
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr float MAX = 65504.0f;
  static constexpr int KEPT = 0, INFINITE = 0x7c000000;
  static constexpr bool RANDOM = true;
  static ZO_INLINE vu extended(vu magnitude) {
    const vi subnormal = (vi)magnitude < 0x38800000;
    const vf tiny = as_f(select(subnormal, magnitude, vu{}));
    vu u = (magnitude - (112u << 23)) << 3;
    u = select(subnormal, (vu)__builtin_convertvector(tiny * 0x1p40f, vi), u);
    return select((vi)magnitude >= 0x7f800000, (((magnitude >> 13) & 0x3ffu) | 0x7c00u) << 16, u);
  }
  static ZO_INLINE vu contracted(vu u) {
    vu b = (u >> 3) + (112u << 23);
    b = select((vi)u >= INFINITE, b + (112u << 23), b);  // infinities and NaN
    return select((vi)u < 1 << 26, as_u(to_float((vi)u) * 0x1p-40f), b);
  }
  static ZO_INLINE vf get(const Bits *p, const char *) {
    const vu h = widen(load<vh>(p)) << 16;
    return as_f(contracted(h & 0x7fffffffu) | (h & 0x80000000u));
  }
  template <bool PAST> static ZO_INLINE void put(Bits *p, vf x, vu random, bool stochastic, char *) {
    const vu b = as_u(x) & 0x7fffffffu, sign = (as_u(x) >> 16) & 0x8000u;
    vu h;
    if (stochastic) {
      h = (extended(b) + random) >> 16;
    } else {
      const vu normal = (b + 0xfffu + ((b >> 13) & 1u)) >> 13;
      const vu subnormal = as_u(as_f(b) + 0.5f) - 0x3f000000u;  // an ulp of 0.5 is the subnormal spacing, 2^-24
      h = select((vi)b < 0x38800000, subnormal, normal - (112u << 10));
      h = select((vi)b >= 0x7f800000, ((b >> 13) & 0x3ffu) | 0x7c00u, h);
    }
    write<PAST>(p, narrow<vh>(h | sign));
  }
};

// A 16-bit format whose elements keep a residual R, int8_t or int16_t, beside them. `get` may give NaN for what only
// `exact` reads.
template <class Format, class R>
struct Kept : Format {
  static constexpr int KEPT = sizeof(R), UNUSED = 16 - 8 * KEPT;  // low bits that the residual does not hold
  static constexpr bool RANDOM = UNUSED != 0;
  using Residuals = std::conditional_t<KEPT == 1, vb, vs>;
  static ZO_INLINE vu high(const uint16_t *p) { return widen(load<vh>(p)) << 16; }
  static ZO_INLINE vi low(const char *residual) { return widen(load<Residuals>(residual)) << UNUSED; }
  static ZO_INLINE vf get(const uint16_t *p, const char *residual) {
    if constexpr (!std::is_same_v<Format, BFloat16>) return exact(p, residual);
    const vf weight = as_f(high(p));
    // Infinities become NaN, which stay NaN. A residual below 0 takes a zero through its sign to NaN.
    return as_f(as_u(weight * 0.0f + weight) + (vu)low(residual));
  }
  static ZO_INLINE vf exact(const uint16_t *p, const char *residual) {
    const vu h = high(p);
    const vi nearest = (vi)(h & 0x7fffffffu), u = nearest + (low(residual) & (nearest < Format::INFINITE));
    return as_f(Format::contracted((vu)(u > 0 ? u : vi{})) | (h & 0x80000000u));
  }
  template <bool> static ZO_INLINE void put(uint16_t *p, vf x, vu random, bool stochastic, char *residual) {
    vu u = Format::extended(as_u(x) & 0x7fffffffu) | (as_u(x) & 0x80000000u);
    if constexpr (RANDOM) u += stochastic ? random >> UNUSED : splat<vu>(1u << (UNUSED - 1));
    store(p, high_halves((u >> UNUSED << UNUSED) + 0x8000u));
    store(residual, narrow<std::conditional_t<KEPT == 1, vb, vh>>(u >> UNUSED));
  }
};

// ---- one tile -----------------------------------------------------------------------------------------------

// The rare lanes: a weight that is not finite passes unchanged, a result beyond the range saturates.
__attribute__((noinline)) int64_t saturate(vf &out, const vf &weight, float limit) {
  int64_t count = 0;
  for (int i = 0; i < LANES; i++) {
    const float w = weight[i], x = out[i];
    if (!(__builtin_fabsf(w) <= Float32::MAX)) {
      uint32_t bits;  // as a quiet NaN that every format can hold, or the infinity
      memcpy(&bits, &w, 4);
      if (w != w) bits = (bits | 0x00400000u) & 0xffff0000u;
      vu all = as_u(out);
      all[i] = bits;
      out = as_f(all);
    } else if (!(__builtin_fabsf(x) <= limit)) {
      out[i] = x != x ? w : __builtin_copysignf(limit, x);
      count++;
    }
  }
  return count;
}

constexpr float MOMENT_FLOOR = 1e-5f;  // what is added to the root of the second moment

struct Buffers {  // one thread's scratch; indices count from a multiple of 128 elements
  alignas(64) float coeffs[ZO_TILE + LANES], restore[ZO_TILE + LANES], curvature[ZO_TILE + LANES];
  alignas(64) uint32_t random[(ZO_TILE + LANES) / 2];  // 16 bits an element
};

// n elements, whose noise is given and which are [first, first + n) in the buffers. `hessian` is null, read, or (curvature)
// updated.
template <class Src, class Dst, bool STOCHASTIC, bool SCALED, bool PAST = false>
int64_t finish(const Tile &t, const Buffers &buf, const float *sums, int64_t first, int64_t n, const typename Src::Bits *src,
               typename Dst::Bits *dst, float *hessian, char *residual) {
  const vf keep = splat<vf>(t.keep);
  int64_t saturated = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t k = first + i;
    const char *kept = residual + i * Src::KEPT;
    if constexpr (PAST) {  // a tile ahead, and not for long: the caches keep what the forward pass has there
      if (!t.block) __builtin_prefetch(src + i + ZO_TILE, 0, 0);
      if (!t.block && Src::KEPT != 0) __builtin_prefetch(kept + ZO_TILE * Src::KEPT, 0, 0);
    }
    vf weight, noise = load<vf>(sums + i);
    if constexpr (SCALED && Src::KEPT != 0)
      weight = Src::exact(src + i, kept);
    else
      weight = Src::get(src + i, kept);
    vf base = weight;
    if constexpr (SCALED) {
      vf h = load<vf>(hessian + i), scale = 1.0f / sqrt(h);
      if (t.curvature) {
        base = weight + load<vf>(buf.restore + k) * scale;
        h = h * (t.remain + load<vf>(buf.curvature + k));
        h = h < t.hessian_min ? splat<vf>(t.hessian_min) : h;
        h = h > t.hessian_max ? splat<vf>(t.hessian_max) : h;
        store(hessian + i, h);
        scale = 1.0f / sqrt(h);
      }
      noise = noise * scale;
    }
    vf out = base * keep + noise;
    if (__builtin_expect(!all_within(out, Dst::MAX), 0)) {
      if constexpr (!SCALED && Src::KEPT != 0) {
        weight = Src::exact(src + i, kept);
        out = weight * keep + noise;
      }
      vf result = out;  // names of their own: what has an address is in memory all the time
      const vf from = weight;
      saturated += saturate(result, from, Dst::MAX);
      out = result;
    }
    const vu random = STOCHASTIC ? widen(load<vh>((const uint16_t *)buf.random + k)) : vu{};
    Dst::template put<PAST>(dst + i, out, random, STOCHASTIC, residual + i * Dst::KEPT);
  }
  return saturated;
}

// Whole vectors go straight through; what is left of one goes through a padded copy.
template <class Src, class Dst, bool STOCHASTIC, bool SCALED>
int64_t finish_all(const Tile &t, Buffers &buf, float *sums) {
  const auto *src = (const typename Src::Bits *)t.src + t.begin;
  auto *dst = (typename Dst::Bits *)t.dst + t.begin;
  float *hessian = SCALED ? t.hessian + t.begin : nullptr;
  char *residual = Src::KEPT ? (char *)t.residual + t.begin * Src::KEPT : nullptr;
  const int64_t first = (t.offset + t.begin) & 127, n = t.end - t.begin, whole = n - n % LANES, rest = n - whole;
  auto *run = finish<Src, Dst, STOCHASTIC, SCALED>;
  if constexpr (!STOCHASTIC && !Dst::KEPT)
    if (t.past && (uintptr_t)dst % ZO_BYTES == 0) run = finish<Src, Dst, STOCHASTIC, SCALED, true>;
  int64_t saturated = run(t, buf, sums, first, whole, src, dst, hessian, residual);
  if (rest) {
    typename Src::Bits from[LANES] = {};
    typename Dst::Bits to[LANES];
    float h[LANES];
    char kept[2 * LANES] = {};
    for (int i = 0; i < LANES; i++) h[i] = SCALED && i < rest ? hessian[whole + i] : 1.0f;
    memcpy(from, src + whole, (size_t)rest * sizeof *from);
    if (Src::KEPT) memcpy(kept, residual + whole * Src::KEPT, (size_t)rest * Src::KEPT);
    for (int64_t i = n; i < whole + LANES; i++) {  // what is behind the end must not saturate
      sums[i] = 0.0f;
      if (SCALED && t.curvature) buf.restore[first + i] = buf.curvature[first + i] = 0.0f;
    }
    saturated += finish<Src, Dst, STOCHASTIC, SCALED>(t, buf, sums + whole, first + whole, LANES, from, to, h, kept);
    memcpy(dst + whole, to, (size_t)rest * sizeof *to);
    if (Dst::KEPT) memcpy(residual + whole * Dst::KEPT, kept, (size_t)rest * Dst::KEPT);
    if (SCALED && t.curvature) memcpy(hessian + whole, h, (size_t)rest * sizeof *h);
  }
  return saturated;
}

template <class Src, class Dst>
int64_t finish_rounded(const Tile &t, Buffers &buf, float *sums) {
  if constexpr (Dst::RANDOM)
    if (t.stochastic)
      return t.hessian ? finish_all<Src, Dst, true, true>(t, buf, sums) : finish_all<Src, Dst, true, false>(t, buf, sums);
  return t.hessian ? finish_all<Src, Dst, false, true>(t, buf, sums) : finish_all<Src, Dst, false, false>(t, buf, sums);
}

template <class Src>
int64_t finish_from(const Tile &t, Buffers &buf, float *sums) {
  if constexpr (Src::KEPT != 0)
    if (t.src == t.dst) return finish_rounded<Src, Src>(t, buf, sums);
  switch (t.dst_dtype) {
    case ZO_FLOAT32: return finish_rounded<Src, Float32>(t, buf, sums);
    case ZO_BFLOAT16: return finish_rounded<Src, BFloat16>(t, buf, sums);
    default: return finish_rounded<Src, Float16>(t, buf, sums);
  }
}

int64_t finish_tile(const Tile &t, Buffers &buf, float *sums) {
  switch (t.src_dtype + t.residual_bits) {
    case ZO_FLOAT32: return finish_from<Float32>(t, buf, sums);
    case ZO_BFLOAT16: return finish_from<BFloat16>(t, buf, sums);
    case ZO_BFLOAT16 + 8: return finish_from<Kept<BFloat16, int8_t>>(t, buf, sums);
    case ZO_BFLOAT16 + 16: return finish_from<Kept<BFloat16, int16_t>>(t, buf, sums);
    case ZO_FLOAT16: return finish_from<Float16>(t, buf, sums);
    case ZO_FLOAT16 + 8: return finish_from<Kept<Float16, int8_t>>(t, buf, sums);
    default: return finish_from<Kept<Float16, int16_t>>(t, buf, sums);
  }
}

// Multiplies the noise by the scales of its elements, a row or what the tile has of one at a time.
void scale(const Tile &t, float *__restrict noise) {
  const int64_t end = t.offset + t.end;
  int64_t e = t.offset + t.begin, row = e / t.columns, column = e - row * t.columns;
  for (; e < end; row++, column = 0) {
    const float factor = t.row_scale ? t.row_scale[row] : 1.0f, *factors = t.column_scale + column;
    const int64_t n = t.columns - column < end - e ? t.columns - column : end - e;
    for (int64_t i = 0; i < n; i++) noise[i] *= factor * factors[i];
    noise += n;
    e += n;
  }
}

template <class Sink>
ZO_INLINE void each_z(int distribution, int64_t e, int64_t n, Noise key, Sink sink) {
  if (distribution == ZO_GAUSSIAN)
    gaussian(e, n, key, sink);
  else
    rademacher(e, n, key, sink);
}

// What comes after the noise.
int64_t finish_run(const zo_pass &pass, const Tile &t, Buffers &buf, float *sums) {
  if (t.column_scale) scale(t, sums);
  if (t.stochastic) {
    constexpr int64_t group = 8 * PAIRS;  // elements whose random bits are made at once
    const int64_t e = (t.offset + t.begin) & -group, n = ((t.offset + t.end + group - 1) & -group) - e;
    philox_words(buf.random + (e & 127) / 2, (uint64_t)e >> 3, n >> 3, ZO_DOMAIN_ROUNDING, {pass.seed, t.id, pass.update});
  }
  return finish_tile(t, buf, sums);
}

// ZO_ROWS rows of a block from ``row``, whose noise is given: what of them the tensor has, a row at a time.
int64_t finish_rows(const zo_pass &pass, const Tile &t, Buffers &buf, float (*sums)[STRIDE], int64_t row, int64_t width) {
  int64_t saturated = 0;
  for (int r = 0; r < ZO_ROWS; r++) {
    const int64_t start = (row + r) * t.noise_columns + t.column - t.offset;
    Tile x = t;
    x.begin = start > t.begin ? start : t.begin;
    x.end = start + width < t.end ? start + width : t.end;
    if (x.begin < x.end) saturated += finish_run(pass, x, buf, sums[r] + (x.begin - start));
  }
  return saturated;
}

// The rows of a block lie far from each other in memory, where the processor does not fetch them ahead by itself.
void prefetch_rows(const Tile &t, int64_t row, int64_t width) {
  const int64_t size = t.src_dtype == ZO_FLOAT32 ? 4 : 2;
  for (int r = 0; r < ZO_ROWS; r++) {
    const char *p = (const char *)t.src + ((row + r) * t.noise_columns + t.column - t.offset) * size;
    for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(p + i, 0, 0);
  }
}

struct Block {  // a thread's scratch for a block, too large for the stacks of some threads
  Factors factors;
  alignas(64) float sums[ZO_HEIGHT][STRIDE];
};

int64_t run_block(const zo_pass &pass, const Tile &t) {
  static thread_local const std::unique_ptr<Block> block(new Block);
  Buffers buf;
  Factors &factors = block->factors;
  float (*const sums)[STRIDE] = block->sums;
  const int64_t left = t.noise_columns - t.column, width = left < t.width ? left : t.width;
  const int64_t above = t.offset / t.noise_columns - t.row, below = (t.offset + t.end - 1) / t.noise_columns - t.row;
  const int from = above > 0 ? (int)above & -ZO_ROWS : 0, to = below < ZO_HEIGHT ? (int)below + 1 : ZO_HEIGHT;
  prefetch_rows(t, t.row + from, width);
  bool first = true;
  factors.n = 0;
  each_term(pass, t, [&](float c, Noise key, uint64_t q) {
    if (factors.n == TERMS) {
      for (int r = from; r < to; r += ZO_ROWS) factors.add(sums + r, r, (int)width, first);
      factors.n = 0;
      first = false;
    }
    factors.append(c, key, q, t.row, t.column, (int)width);
  });
  int64_t saturated = 0;
  for (int r = from; r < to; r += ZO_ROWS) {
    float (*rows)[STRIDE] = sums + (first ? 0 : r);  // the same few again where no other terms wait there
    if (r + ZO_ROWS < to) prefetch_rows(t, t.row + r + ZO_ROWS, width);
    factors.add(rows, r, (int)width, first);
    saturated += finish_rows(pass, t, buf, rows, t.row + r, width);
  }
  return saturated;
}

int64_t run_tile(const zo_pass &pass, const Tile &t) {
  if (t.block) return run_block(pass, t);
  Buffers buf;
  if (pass.distribution == ZO_FACTORED && t.noise_columns) {
    float *sums = buf.coeffs + ((t.offset + t.begin) & 127);
    run_noise(pass, t, sums, t.offset + t.begin, t.offset + t.end);
    return finish_run(pass, t, buf, sums);
  }
  // The noise is made for whole groups of 128 elements around [begin, end): blocks never start inside one.
  const int64_t e = (t.offset + t.begin) & ~(int64_t)127, n = ((t.offset + t.end + 127) & ~(int64_t)127) - e;
  bool empty = true;
  for (int64_t k = 0; k < pass.n_streams; k++) {
    const int64_t at = k * t.n_tensors + t.index;
    const float c = pass.coeffs[at], r = t.curvature ? pass.restore[at] : 0;
    const float q = t.curvature ? pass.curvature[at] : t.squares ? pass.squares[at] : 0;
    if (c == 0 && r == 0 && q == 0) continue;
    const Noise key = {pass.seed, t.id, pass.streams[k]};
    if (t.curvature)
      each_z(pass.distribution, e, n, key, [&](int64_t i, vf z) {
        store(buf.coeffs + i, empty ? c * z : load<vf>(buf.coeffs + i) + c * z);
        store(buf.restore + i, empty ? r * z : load<vf>(buf.restore + i) + r * z);
        store(buf.curvature + i, empty ? q * (z * z) : load<vf>(buf.curvature + i) + q * (z * z));
      });
    else if (t.squares)
      each_z(pass.distribution, e, n, key, [&](int64_t i, vf z) {
        store(buf.coeffs + i, empty ? c * z : load<vf>(buf.coeffs + i) + c * z);
        store(buf.curvature + i, empty ? q * (z * z) : load<vf>(buf.curvature + i) + q * (z * z));
      });
    else if (empty)
      each_z(pass.distribution, e, n, key, [&](int64_t i, vf z) { store(buf.coeffs + i, c * z); });
    else
      each_z(pass.distribution, e, n, key,
             [&](int64_t i, vf z) { store(buf.coeffs + i, load<vf>(buf.coeffs + i) + c * z); });
    empty = false;
  }
  if (empty) {
    memset(buf.coeffs, 0, sizeof buf.coeffs);
    memset(buf.restore, 0, sizeof buf.restore);
    memset(buf.curvature, 0, sizeof buf.curvature);
  }
  if (t.squares)
    for (int64_t i = 0; i < n; i += LANES)
      store(buf.coeffs + i, load<vf>(buf.coeffs + i) / (sqrt(load<vf>(buf.curvature + i)) + splat<vf>(MOMENT_FLOOR)));
  return finish_run(pass, t, buf, buf.coeffs + ((t.offset + t.begin) & 127));
}

void words(uint32_t *out, uint64_t block, int64_t n_blocks, uint32_t domain, uint64_t seed, uint32_t tensor_id,
           uint32_t stream, int rounds) {
  uint32_t group[4 * PAIRS];
  for (int64_t b = 0; b < n_blocks; b += PAIRS) {
    const Noise noise = {seed, tensor_id, stream};
    if (rounds == 10)
      philox_words<10>(group, block + (uint64_t)b, PAIRS, domain, noise);
    else
      philox_words(group, block + (uint64_t)b, PAIRS, domain, noise);
    const int64_t count = n_blocks - b < PAIRS ? n_blocks - b : PAIRS;
    memcpy(out + 4 * b, group, (size_t)count * 16);
  }
}

void signs_from(float *out, int64_t n, uint32_t domain, uint64_t seed, uint32_t tensor_id, uint32_t stream, int q) {
  signs(out, n, (uint64_t)domain << DOMAIN | (uint64_t)q << 40, {seed, tensor_id, stream});
}

}  // namespace

extern const Variant ZO_VARIANT = {run_tile, words, signs_from};
