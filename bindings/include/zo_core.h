/* zo_core C ABI: Philox noise (version 1) and the fused pass over CPU tensors.
 *
 * One operation, for every tensor i of a list and every element e of it:
 *
 *   dst = round( (1 - decay) * (src + H^-1/2 * sum_k restore[k] z_k)  +  H'^-1/2 * sum_k coeffs[k] z_k )
 *   H'  = clamp( H * (1 - smoothing + sum_k curvature[k] z_k^2), hessian_min, hessian_max )
 *
 * z_k is the noise of stream k at element `offset + e` of tensor `id`: a pure function, never stored. That of a matrix may
 * be factored: rank^-1/2 times a sum of `rank` products of a sign of the row and a sign of the column.
 * Without a hessian H = H' = 1, or H^-1/2 is given in two factors, row_scale[f / columns] * column_scale[f % columns]
 * with f = offset + e, the index in the full tensor. With `squares`, H'^-1/2 is 1 / (sqrt(sum_k squares[k] z_k^2) + 1e-5). Sums are float32, the result is rounded once. A bfloat16 or float16
 * src may keep a residual of 8 or 16 bits an element: src above is then the value weight + residual (docs/noise.md), and
 * in place what rounding takes becomes the new residual.
 *
 * The library holds no state but the selected instruction set, allocates nothing that outlives a call, and
 * is safe to call from several threads on disjoint tensors. Set structs to zero before filling them in.
 * examples/c/perturb.c is a program that uses it; docs/integrations.md has the rules in one place.
 */
#ifndef ZO_CORE_H
#define ZO_CORE_H
#include <stdint.h>

#if defined(__GNUC__)
#define ZO_API __attribute__((visibility("default")))
#else
#define ZO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ZO_ABI_VERSION 7   /* layout of the structs below */
#define ZO_NOISE_VERSION 1 /* docs/noise.md */
#define ZO_MAX_RANK 1024   /* of factored noise */

enum zo_dtype { ZO_FLOAT32 = 0, ZO_BFLOAT16 = 1, ZO_FLOAT16 = 2 };
enum zo_distribution { ZO_GAUSSIAN = 0, ZO_RADEMACHER = 1, ZO_FACTORED = 2 };
enum zo_rounding { ZO_NEAREST = 0, ZO_STOCHASTIC = 1 };
enum zo_domain {
  ZO_DOMAIN_GAUSSIAN = 0, ZO_DOMAIN_RADEMACHER = 1, ZO_DOMAIN_ROUNDING = 2, ZO_DOMAIN_HOST = 3, ZO_DOMAIN_ROWS = 4,
  ZO_DOMAIN_COLUMNS = 5
};
enum zo_isa { ZO_ISA_PORTABLE = 0, ZO_ISA_AVX2 = 1, ZO_ISA_AVX512 = 2 };
enum zo_status { ZO_OK = 0, ZO_BAD_ARGUMENT = 1 };

typedef struct zo_tensor {
  const void *src; /* numel elements of src_dtype, contiguous */
  void *dst;       /* numel elements of dst_dtype; the same memory as src, or disjoint from it */
  float *hessian;  /* numel float32, or NULL */
  void *residual;  /* of src: numel int8 or int16, or NULL; written only where dst is src */
  int64_t numel;
  int64_t offset; /* index of the first element in the full, unsharded tensor; at most 2^56 */
  uint32_t id;    /* tensor id of the noise */
  int32_t src_dtype, dst_dtype;
  int32_t residual_bits;     /* 8 or 16, or 0 for none; 0 for float32 */
  const float *row_scale;    /* one float32 for each row that `columns` divide the full tensor into; NULL for 1 */
  const float *column_scale; /* `columns` float32, or NULL for no scales; not with a hessian */
  int64_t columns;           /* at least 1 with a column_scale; a vector is one row */
  int64_t noise_columns; /* for factored noise: the last dimension of the full tensor, 0 for a vector; at most 2^47, as its rows */
} zo_tensor;

typedef struct zo_pass {
  uint64_t seed;
  const uint32_t *streams; /* n_streams */
  const float *coeffs;     /* n_streams x n_tensors, row-major; a zero leaves the tensor out of the stream */
  const float *restore;    /* the same shape, or NULL; only with hessians */
  const float *curvature;  /* the same shape, or NULL; only with hessians, which it updates */
  const float *decay;      /* n_tensors, or NULL for 0 */
  const float *smoothing;  /* n_tensors; used with curvature */
  const float *squares;    /* the shape of coeffs, or NULL; Gaussian, and without hessians and scales */
  int64_t n_streams;
  float hessian_min, hessian_max; /* limits of H', used with curvature: 0 < min <= max; the Python side has 1e-8 and 1e8 */
  int32_t distribution, rounding;
  uint32_t update; /* stream of the stochastic rounding */
  int32_t threads; /* at least 1 */
  int32_t rank;    /* of factored noise, 1 to ZO_MAX_RANK, then without curvature; of no other */
} zo_pass;

/* Runs one pass. counters holds 1 + n_tensors. counters[0] += 1 and nothing else is written when any scalar is
 * not finite; counters[1 + i] += elements of tensor i whose result was beyond the range of dst_dtype and saturated. */
ZO_API int zo_run(const zo_pass *pass, const zo_tensor *tensors, int64_t n_tensors, int64_t *counters);

/* Runs passes one after the other on tensors in place (src is dst): the same bits and counts as a zo_run each, but memory
 * is read and written once, as all passes go over a tile before the next one. All have one distribution. The first pass says how many threads. */
ZO_API int zo_run_steps(const zo_pass *passes, int64_t n_passes, const zo_tensor *tensors, int64_t n_tensors,
                        int64_t *counters);

/* Writes 4 * n_blocks raw Philox4x32 words of consecutive blocks (rounds: 7, the noise's, or 10). */
ZO_API int zo_philox(uint64_t seed, uint32_t domain, uint32_t tensor_id, uint32_t stream, uint64_t block,
              int64_t n_blocks, int32_t rounds, uint32_t *words);

/* Writes n_streams x rank x n random signs, +1 or -1: those of stream k and q = 0 .. rank - 1 at indices 0 .. n - 1 of a
 * domain (docs/noise.md). The factors of factored noise are in ZO_DOMAIN_ROWS and ZO_DOMAIN_COLUMNS. */
ZO_API int zo_signs(uint64_t seed, uint32_t domain, uint32_t tensor_id, const uint32_t *streams, int64_t n_streams,
                    int32_t rank, int64_t n, float *signs);

ZO_API int zo_isa_available(int isa); /* compiled in and supported by this processor */
ZO_API int zo_isa_get(void);          /* the one in use; the best available one at start */
ZO_API int zo_isa_set(int isa);       /* process-wide; ZO_BAD_ARGUMENT if not available */
ZO_API int zo_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
