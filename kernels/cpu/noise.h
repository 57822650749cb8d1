// Noise version 1 (docs/noise.md) for aligned runs of elements, in vector registers.
#pragma once
#include "simd.h"

namespace {

struct Noise {       // what names a stream of one tensor
  uint64_t seed;
  uint32_t tensor_id, stream;
};

struct Words { vq w[4]; };  // Philox words in the low halves of 64-bit lanes; the high halves are garbage

// Philox4x32 (Salmon et al., SC'11). 64-bit lanes let one multiply give both halves of a product, so a round
// is 2 multiplies, 2 shifts and 2 three-way xors; what is left in the high halves is never read.
// 7 rounds is the fewest that pass BigCrush (the paper, table 2).
template <int ROUNDS = 7>
ZO_INLINE Words philox(vq block, uint32_t domain, Noise key) {
  vq c0 = block, c1 = (block >> 32) | splat<vq>((uint64_t)domain << 24);
  vq c2 = splat<vq>((uint64_t)key.tensor_id), c3 = splat<vq>((uint64_t)key.stream);
  uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < ROUNDS; round++) {
    const vq p0 = mul32(c0, 0xD2511F53u), p1 = mul32(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ splat<vq>((uint64_t)k0);
    c2 = (p0 >> 32) ^ c3 ^ splat<vq>((uint64_t)k1);
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Lane 2j holds block j and lane 2j+1 block PAIRS/2 + j, so that interleaving within 128 bits, the one
// shuffle every instruction set has, leaves the elements of consecutive blocks in consecutive order.
ZO_INLINE vq block_lanes() {
  vq v{};
  for (int j = 0; j < PAIRS; j++) v[j] = (uint64_t)((j & 1) * (PAIRS / 2) + j / 2);
  return v;
}

ZO_INLINE vu pack(vq even, vq odd) { return (vu)((even & 0xffffffffu) | (odd << 32)); }

// Raw words of n_blocks (a multiple of PAIRS) consecutive blocks, in order.
template <int ROUNDS = 7>
ZO_INLINE void philox_words(uint32_t *out, uint64_t block, int64_t n_blocks, uint32_t domain, Noise key) {
  for (int64_t b = 0; b < n_blocks; b += PAIRS, out += 4 * PAIRS) {
    const Words x = philox<ROUNDS>(block_lanes() + (block + (uint64_t)b), domain, key);
    vq low, high;
    interleave64((vq)pack(x.w[0], x.w[1]), (vq)pack(x.w[2], x.w[3]), low, high);
    store(out, low);
    store(out + LANES, high);
  }
}

// -2 ln(u) for u in [2^-33, 1]: u = 2^e m with m in [0.75, 1.5), polynomial in f = m - 1 (Chebyshev nodes on
// [-1/4, 1/2], relative error 5e-8 also next to u = 1, where the radius goes to 0).
ZO_INLINE vf minus_two_log(vf u) {
  const vu bits = as_u(u);
  const vi e = (vi)(bits - 0x3f400000u) >> 23;
  const vf f = as_f(bits - (vu)(e << 23)) - 1.0f;
  vf q = f * -0x1.b1c66ep-4f + 0x1.e9c066p-3f;
  q = q * f + -0x1.32a51ap-2f;
  q = q * f + 0x1.58cb88p-2f;
  q = q * f + -0x1.992bacp-2f;
  q = q * f + 0x1.ffdadcp-2f;
  q = q * f + -0x1.5555c8p-1f;
  q = q * f + 0x1.000018p+0f;
  q = q * f + -2.0f;
  return q * f + to_float(e) * -1.3862943611198906f;
}

// Box-Muller on the pair of words (w_even, w_odd). The angle int32(w_odd) * 2 pi / 2^32 is split in integers,
// exactly, into the nearest quarter turn and a rest t * pi/4 with t in [-1, 1].
ZO_INLINE void box_muller(vu w_even, vu w_odd, vf &z_even, vf &z_odd) {
  const vf r = sqrt(minus_two_log(to_float(w_even) * 0x1p-32f + 0x1p-33f));
  const vf t = to_float((vi)(w_odd << 2)) * 0x1p-31f;
  const vf t2 = t * t;
  const vf sine = (((t2 * -3.595429006963968e-05f + 0.0024900068528950214f) * t2 + -0.08074543625116348f) * t2 +
                   0.7853981852531433f) * t;
  const vf cosine = ((t2 * -0.0003188774862792343f + 0.01584991067647934f) * t2 + -0.3084242641925812f) * t2 + 1.0f;
  const vu turn = w_odd + 0x20000000u;  // the quarter turn is in the top two bits
  const vi swapped = (vi)(turn << 1) < 0;
  const vu c = select(swapped, as_u(sine), as_u(cosine)), s = select(swapped, as_u(cosine), as_u(sine));
  z_even = r * as_f(c ^ ((turn + 0x40000000u) & 0x80000000u));
  z_odd = r * as_f(s ^ (turn & 0x80000000u));
}

// z of elements [e, e + n), e and n multiples of 128, given vector by vector to sink(index from e, z).
template <class Sink>
ZO_INLINE void gaussian(int64_t e, int64_t n, Noise key, Sink sink) {
  for (int64_t i = 0; i < n; i += 4 * PAIRS) {
    const Words x = philox(block_lanes() + (uint64_t)((e + i) >> 2), 0, key);
    vf even, odd;
    box_muller(pack(x.w[0], x.w[2]), pack(x.w[1], x.w[3]), even, odd);
    vu low, high;
    interleave(as_u(even), as_u(odd), low, high);
    sink(i, as_f(low));
    sink(i + LANES, as_f(high));
  }
}

template <class Sink>
ZO_INLINE void rademacher(int64_t e, int64_t n, Noise key, Sink sink) {
  for (int64_t i = 0; i < n; i += 128 * PAIRS) {  // the last blocks may lie behind n and are left unused
    uint32_t words[4 * PAIRS];
    philox_words(words, (uint64_t)((e + i) >> 7), PAIRS, 1, key);
    const int64_t end = n - i < 128 * PAIRS ? n - i : 128 * PAIRS;
    for (int64_t j = 0; j < end; j += 32) {
      const vu flipped = splat<vu>(~words[j / 32]);
      for (int k = 0; k < 32; k += LANES)  // move each lane's own bit to the sign
        sink(i + j + k, as_f(((flipped << (31 - k - iota())) & 0x80000000u) | 0x3f800000u));
    }
  }
}

}  // namespace
