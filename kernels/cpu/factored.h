// Factored noise (docs/noise.md): z[i, j] = rank^-1/2 sum_q a_q(i) b_q(j) with signs a of rows and b of columns.
//
// A term is a stream k and a q: c a(i) b(j), c = coeffs[k] rank^-1/2. The sum of the terms of a block of rows and columns is
// a product of two small matrices, a with c in it and b, that stay in the caches: an element costs a fused multiply-add a
// term, and Philox makes 9 blocks of signs a term for 65,536 elements, where Rademacher noise takes 512.
#pragma once
#include <cmath>

#include "noise.h"
#include "pass.h"

namespace {

constexpr int TERMS = 8;                        // summed at a time, 33 KiB of column signs
constexpr int STRIDE = ZO_WIDTH + 16;           // of a row of sums: a vector more, and rows start in different cache sets
constexpr int ACROSS = ZO_WIDTH / 128;          // Philox blocks of the columns of a block
constexpr int MOST_BLOCKS = ZO_TILE / 128 + 1;  // of Philox, that the rows or columns of a tile lie in
constexpr uint64_t DOMAIN = 56;                 // its place in what philox() takes for a block, if it is told domain 0

// The words of Philox blocks, domain << DOMAIN | block each; ``out`` and ``blocks`` have room for a multiple of PAIRS.
ZO_INLINE void words_of(uint32_t (*out)[4], const uint64_t *blocks, int n, Noise key) {
  for (int b = 0; b < n; b += PAIRS) {
    vq lanes, low, high;
    for (int l = 0; l < PAIRS; l++) lanes[l] = blocks[b + (l & 1) * (PAIRS / 2) + l / 2];  // as block_lanes() has them
    const Words x = philox(lanes, 0, key);
    interleave64((vq)pack(x.w[0], x.w[1]), (vq)pack(x.w[2], x.w[3]), low, high);
    store(out[b], low);
    store((uint32_t *)out[b] + LANES, high);
  }
}

// The 32 signs of a word as +1 and -1.
ZO_INLINE void signs_of(float *out, uint32_t word) {
  for (int k = 0; k < 32; k += LANES)
    store(out + k, as_f(((splat<vu>(word) << (31 - k - iota())) & 0x80000000u) ^ 0xbf800000u));
}

ZO_INLINE float signed_by(float x, const uint32_t (*words)[4], int64_t i) {  // bit i of the words; no branch on a random bit
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits ^= ~words[i >> 7][(i >> 5) & 3] >> (i & 31) << 31;
  memcpy(&x, &bits, 4);
  return x;
}

// Calls f(c rank^-1/2, key, q) for the terms of a tensor, in order.
template <class F>
ZO_INLINE void each_term(const zo_pass &pass, const Tile &t, F f) {
  const float scale = (float)(1.0 / std::sqrt((double)pass.rank));
  for (int64_t k = 0; k < pass.n_streams; k++) {
    const float c = pass.coeffs[k * t.n_tensors + t.index];
    if (c == 0) continue;
    for (int q = 0; q < pass.rank; q++) f(c * scale, Noise{pass.seed, t.id, pass.streams[k]}, (uint64_t)q << 40);
  }
}

// Up to TERMS terms of the noise of a block, a[.][row] b[.][column]: the signs of its columns, those of its rows times c.
struct Factors {
  alignas(64) float a[TERMS][ZO_HEIGHT], b[TERMS][STRIDE];
  int n;

  // The term of rows from ``row`` and of ``width`` columns from ``column``, multiples of ZO_HEIGHT and 128.
  ZO_INLINE void append(float c, Noise key, uint64_t q, int64_t row, int64_t column, int width) {
    uint64_t blocks[ACROSS + 8] = {(uint64_t)row >> 7 | q | (uint64_t)ZO_DOMAIN_ROWS << DOMAIN};
    uint32_t words[ACROSS + 8][4];
    for (int i = 0; i < ACROSS; i++)
      blocks[1 + i] = ((uint64_t)(column >> 7) + (uint64_t)i) | q | (uint64_t)ZO_DOMAIN_COLUMNS << DOMAIN;
    words_of(words, blocks, 1 + (width + 127) / 128, key);
    for (int x = 0; x < width; x += 32) signs_of(b[n] + x, words[1 + x / 128][x / 32 % 4]);
    for (int r = 0; r < ZO_HEIGHT; r += 32) signs_of(a[n] + r, words[0][(row + r) / 32 % 4]);
    for (int r = 0; r < ZO_HEIGHT; r++) a[n][r] *= c;
    n++;
  }

  // sums[r][x] (+)= sum of the terms, in order, for ZO_ROWS rows from the block's row ``row`` and x < width.
  ZO_INLINE void add(float (*sums)[STRIDE], int row, int width, bool first) const {
    for (int x = 0; x < width; x += LANES) {
      vf sum[ZO_ROWS];  // as many as hide the latency of a multiply-add
#pragma GCC unroll 8
      for (int r = 0; r < ZO_ROWS; r++) sum[r] = first ? vf{} : load<vf>(sums[r] + x);
      for (int t = 0; t < n; t++) {
        const vf signs = load<vf>(b[t] + x);
#pragma GCC unroll 8
        for (int r = 0; r < ZO_ROWS; r++) sum[r] = sum[r] + a[t][row + r] * signs;
      }
#pragma GCC unroll 8
      for (int r = 0; r < ZO_ROWS; r++) store(sums[r] + x, sum[r]);
    }
  }
};

// The noise of elements [e, end) of the full tensor, at most ZO_TILE, where there are few rows or narrow ones.
void run_noise(const zo_pass &pass, const Tile &t, float *__restrict noise, int64_t e, int64_t end) {
  const int64_t n = t.noise_columns, row = e / n, last = (end - 1) / n;
  const bool narrow = n <= ZO_WIDTH;  // then all columns are needed, for many rows
  alignas(64) float b[ZO_TILE + 256];
  uint64_t blocks[MOST_BLOCKS + 8] = {};
  uint32_t rows[MOST_BLOCKS + 8][4], words[MOST_BLOCKS + 8][4];
  const auto spread = [&](int64_t column, int64_t count, Noise key, uint64_t q) {  // their signs, from b[column & 127] on
    const int of = (int)((column & 127) + count + 127) >> 7;
    for (int i = 0; i < of; i++)
      blocks[i] = ((uint64_t)(column >> 7) + (uint64_t)i) | q | (uint64_t)ZO_DOMAIN_COLUMNS << DOMAIN;
    words_of(words, blocks, of, key);
    for (int i = 0; i < 4 * of; i++) signs_of(b + 32 * i, words[i / 4][i % 4]);
  };
  for (int64_t i = 0; i < end - e; i++) noise[i] = 0;
  each_term(pass, t, [&](float c, Noise key, uint64_t q) {
    const int of = (int)((last >> 7) - (row >> 7)) + 1;
    for (int i = 0; i < of; i++)
      blocks[i] = ((uint64_t)(row >> 7) + (uint64_t)i) | q | (uint64_t)ZO_DOMAIN_ROWS << DOMAIN;
    words_of(rows, blocks, of, key);
    if (narrow) spread(0, n, key, q);
    int64_t at = e;
    for (int64_t i = row; i <= last; i++) {
      const int64_t column = at - i * n, count = n - column < end - at ? n - column : end - at;
      if (!narrow) spread(column, count, key, q);
      const float *signs = b + (narrow ? column : column & 127), s = signed_by(c, rows, i - (row & ~(int64_t)127));
      float *out = noise + (at - e);
      for (int64_t x = 0; x < count; x++) out[x] += s * signs[x];
      at += count;
    }
  });
}

// The signs of indices 0 to n - 1 of a domain.
void signs(float *out, int64_t n, uint64_t domain_and_q, Noise key) {
  for (int64_t i = 0; i < n; i += 128 * PAIRS) {
    uint64_t blocks[PAIRS];
    uint32_t words[PAIRS][4];
    for (int b = 0; b < PAIRS; b++) blocks[b] = ((uint64_t)(i >> 7) + (uint64_t)b) | domain_and_q;
    words_of(words, blocks, PAIRS, key);
    for (int64_t x = 0; x < 128 * PAIRS && i + x < n; x += 32) {
      float some[32];
      signs_of(some, words[x / 128][x / 32 % 4]);
      memcpy(out + i + x, some, (size_t)(n - i - x < 32 ? n - i - x : 32) * sizeof *some);
    }
  }
}

}  // namespace
