// Between the C entry points (zo_core.cpp) and the variants of pass.cpp, one an instruction set.
#pragma once
#include "zo_core.h"

constexpr int ZO_TILE = 2048;  // elements; a thread's scratch is then 28 KiB and stays in its first-level cache, without blocks

// A tile of factored noise, where rows are wide and there are some, is a block of rows and columns (factored.h). Its columns'
// signs are made once; its rows are finished ZO_ROWS at a time.
constexpr int ZO_ROWS = 8, ZO_HEIGHT = 64, ZO_WIDTH = 1024;

struct Tile {
  const void *src;
  void *dst;
  float *hessian;
  void *residual;
  const float *row_scale, *column_scale;
  int64_t columns, noise_columns;
  int64_t offset, begin, end;  // elements [begin, end) of a tensor whose first element has index `offset`
  int64_t row, column, width;  // of a block: where it starts in the full tensor; it has what lies in [begin, end)
  int64_t index, n_tensors;    // column of the coefficient matrices, and how many they have
  uint32_t id;
  int32_t src_dtype, dst_dtype, residual_bits;
  bool stochastic, curvature;  // whether results are rounded with random bits, whether H changes
  bool squares;                // whether noise is divided by the root of its second moment
  bool block;                  // whether it is one of ZO_HEIGHT rows and ``width`` columns
  bool past;                   // whether copies go past the caches to memory
  float keep, remain, hessian_min, hessian_max;  // 1 - decay, 1 - smoothing, limits of H
};

struct Variant {
  int64_t (*run_tile)(const zo_pass &, const Tile &);  // the number of elements that saturated
  void (*words)(uint32_t *out, uint64_t block, int64_t n_blocks, uint32_t domain, uint64_t seed, uint32_t tensor_id,
                uint32_t stream, int rounds);
  void (*signs)(float *out, int64_t n, uint32_t domain, uint64_t seed, uint32_t tensor_id, uint32_t stream, int q);
};

extern const Variant zo_portable, zo_avx2, zo_avx512;
