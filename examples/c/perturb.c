/* Perturbs weights in plain C, with the noise that Python has: the same seed, tensor id and stream give the same bits.
 *
 *   HERE=$(python -c 'from zo_core.bindings import native; print(native.LIBRARY.parent)')
 *   cc -std=c11 -I$HERE/include perturb.c $HERE/libzo_core.so -Wl,-rpath,$HERE -o perturb
 *   ./perturb moved.bin restored.bin
 *
 * writes the weights after theta + eps z, and after going back, as raw float32.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "zo_core.h"

enum { N = 100003 };
static const uint64_t SEED = 42;
static const float EPS = 1e-3f;

/* dst <- src + c z, of one tensor; in place if dst is src. Returns how many elements saturated. */
static int64_t add_noise(const float *src, float *dst, int64_t n, uint32_t id, uint32_t stream, float c) {
  zo_tensor tensor = {.src = src, .dst = dst, .numel = n, .id = id, .src_dtype = ZO_FLOAT32, .dst_dtype = ZO_FLOAT32};
  zo_pass pass = {
      .seed = SEED, .streams = &stream, .coeffs = &c, .n_streams = 1, .distribution = ZO_GAUSSIAN, .threads = 1};
  int64_t counters[2] = {0, 0}; /* passes that were no-ops because a scalar was not finite; saturated elements */
  if (zo_run(&pass, &tensor, 1, counters) != ZO_OK || counters[0]) {
    fprintf(stderr, "zo_run refused its arguments\n");
    exit(1);
  }
  return counters[1];
}

static void save(const char *path, const float *w) {
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(w, sizeof *w, N, file) != N || fclose(file)) {
    perror(path);
    exit(1);
  }
}

int main(int argc, char **argv) {
  static float w[N], copy[N], probe[N];
  if (argc != 3) return fprintf(stderr, "usage: %s MOVED RESTORED\n", argv[0]), 2;
  if (zo_abi_version() != ZO_ABI_VERSION) return fprintf(stderr, "the library does not belong to this header\n"), 1;
  for (int i = 0; i < N; i++) w[i] = (float)(i % 1000 - 500) / 1024.0f;
  memcpy(copy, w, sizeof w);

  /* A probe beside the weights: they are only read, so there is nothing to restore. */
  add_noise(w, probe, N, 7, 3, EPS);
  if (memcmp(w, copy, sizeof w)) return fprintf(stderr, "the weights were written\n"), 1;

  /* The same in place, and back: to within rounding. */
  add_noise(w, w, N, 7, 3, EPS);
  if (memcmp(w, probe, sizeof w)) return fprintf(stderr, "in place is not what it is beside\n"), 1;
  save(argv[1], w);
  add_noise(w, w, N, 7, 3, -EPS);
  save(argv[2], w);
  float most = 0;
  for (int i = 0; i < N; i++) {
    const float off = w[i] < copy[i] ? copy[i] - w[i] : w[i] - copy[i];
    if (off > most) most = off;
  }
  printf("%d weights perturbed and restored to within %g\n", N, (double)most);
  return 0;
}
