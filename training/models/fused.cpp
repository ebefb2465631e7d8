// GroupNorm and ReLU in one pass over channels_last memory, and the standardisation of filters straight into the precision of the
// convolution; forward and backward. Plain C interface, called by fused.py.
//
// Statistics are fp32 sums of 64 rows, added up in double; nothing but them is kept for backward, which recomputes the mask.
// A picture is worked on by one thread, so the result does not depend on how many there are.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bf16 value) {
  uint32_t wide = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void store(float *to, float value) { *to = value; }
inline void store(bf16 *to, float value) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

constexpr int64_t ROWS = 64;

template <typename T>
void forward(const T *x, const float *gamma, const float *beta, T *y, float *mean, float *rstd, int64_t pictures,
             int64_t pixels, int64_t channels, int64_t groups, double eps, int threads) {
  const int64_t per_group = channels / groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < pictures; n++) {
    const T *in = x + n * pixels * channels;
    T *out = y + n * pixels * channels;
    std::vector<double> total(channels), squares(channels);
    std::vector<float> sum(channels), square(channels);
    float *s = sum.data(), *q = square.data();
    for (int64_t start = 0; start < pixels; start += ROWS) {
      const int64_t end = start + ROWS < pixels ? start + ROWS : pixels;
      std::memset(s, 0, channels * 4), std::memset(q, 0, channels * 4);
      for (int64_t p = start; p < end; p++) {
        const T *row = in + p * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
          const float v = load(row[c]);
          s[c] += v, q[c] += v * v;
        }
      }
      for (int64_t c = 0; c < channels; c++) total[c] += s[c], squares[c] += q[c];
    }
    for (int64_t g = 0; g < groups; g++) {
      double a = 0, b = 0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) a += total[c], b += squares[c];
      const double count = double(pixels) * per_group, m = a / count, variance = b / count - m * m;
      const double r = 1.0 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps);
      mean[n * groups + g] = m, rstd[n * groups + g] = r;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) s[c] = gamma[c] * r, q[c] = beta[c] - m * r * gamma[c];
    }
    for (int64_t p = 0; p < pixels; p++) {
      const T *row = in + p * channels;
      T *to = out + p * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const float v = load(row[c]) * s[c] + q[c];
        store(to + c, v <= 0 ? 0 : v);
      }
    }
  }
}

// dgamma and dbeta are of each picture, [pictures, channels]; their sum over pictures is taken outside, in order.
template <typename T>
void backward(const T *dy, const T *x, const float *gamma, const float *beta, const float *mean, const float *rstd, T *dx,
              float *dgamma, float *dbeta, int64_t pictures, int64_t pixels, int64_t channels, int64_t groups, int threads) {
  const int64_t per_group = channels / groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < pictures; n++) {
    const T *in = x + n * pixels * channels, *up = dy + n * pixels * channels;
    T *out = dx + n * pixels * channels;
    std::vector<double> total(channels), products(channels);
    std::vector<float> sum(channels), product(channels), scale(channels), shift(channels);
    float *s = sum.data(), *q = product.data(), *a = scale.data(), *b = shift.data();
    for (int64_t c = 0; c < channels; c++) {
      const float r = rstd[n * groups + c / per_group], m = mean[n * groups + c / per_group];
      a[c] = gamma[c] * r, b[c] = beta[c] - m * r * gamma[c];
    }
    for (int64_t start = 0; start < pixels; start += ROWS) {
      const int64_t end = start + ROWS < pixels ? start + ROWS : pixels;
      std::memset(s, 0, channels * 4), std::memset(q, 0, channels * 4);
      for (int64_t p = start; p < end; p++) {
        const T *row = in + p * channels, *gradient = up + p * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
          const float v = load(row[c]);
          const float d = v * a[c] + b[c] > 0 ? load(gradient[c]) : 0;
          s[c] += d, q[c] += d * v;
        }
      }
      for (int64_t c = 0; c < channels; c++) total[c] += s[c], products[c] += q[c];
    }
    for (int64_t g = 0; g < groups; g++) {
      const double m = mean[n * groups + g], r = rstd[n * groups + g], count = double(pixels) * per_group;
      double A = 0, B = 0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) {
        A += gamma[c] * products[c], B += gamma[c] * total[c];
        dgamma[n * channels + c] = r * (products[c] - m * total[c]), dbeta[n * channels + c] = total[c];
      }
      const double of_x = (B * m - A) * r * r * r / count, constant = -of_x * m - B * r / count;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) s[c] = of_x, q[c] = constant;
    }
    for (int64_t p = 0; p < pixels; p++) {
      const T *row = in + p * channels, *gradient = up + p * channels;
      T *to = out + p * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const float v = load(row[c]);
        const float d = v * a[c] + b[c] > 0 ? load(gradient[c]) : 0;
        store(to + c, d * a[c] + v * s[c] + q[c]);
      }
    }
  }
}

// The sum of f(i) over a row: fp32 in LANES sums side by side (one sum alone waits for itself), which are added up in double.
constexpr int64_t LANES = 64;

template <typename F>
inline double sum_of(int64_t count, F f) {
  float lanes[LANES] = {};
  const int64_t whole = count - count % LANES;
  for (int64_t start = 0; start < whole; start += LANES) {
#pragma omp simd
    for (int64_t i = 0; i < LANES; i++) lanes[i] += f(start + i);
  }
  double total = 0;
  for (int64_t i = 0; i < LANES; i++) total += lanes[i];
  for (int64_t i = whole; i < count; i++) total += f(i);
  return total;
}

// Filters are rows [filters, size] of fp32 weights; each is standardised to mean 0, variance 1.
template <typename T>
void standardize(const float *w, T *out, float *mean, float *rstd, int64_t filters, int64_t size, double eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < filters; n++) {
    const float *in = w + n * size;
    T *to = out + n * size;
    const float m = sum_of(size, [&](int64_t i) { return in[i]; }) / size;
    const double squares = sum_of(size, [&](int64_t i) { return (in[i] - m) * (in[i] - m); });
    const float r = 1.0 / __builtin_sqrt(squares / size + eps);
    mean[n] = m, rstd[n] = r;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) store(to + i, (in[i] - m) * r);
  }
}

template <typename T>
void standardize_backward(const T *up, const float *w, const float *mean, const float *rstd, float *dw, int64_t filters,
                          int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < filters; n++) {
    const float *in = w + n * size, m = mean[n], r = rstd[n];
    const T *gradient = up + n * size;
    float *to = dw + n * size;
    const float average = sum_of(size, [&](int64_t i) { return load(gradient[i]); }) / size;
    const float along = sum_of(size, [&](int64_t i) { return load(gradient[i]) * ((in[i] - m) * r); }) / size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) to[i] = r * (load(gradient[i]) - average - (in[i] - m) * r * along);
  }
}

}  // namespace

#define FUSED(NAME, T)                                                                                                    \
  extern "C" void forward_##NAME(const void *x, const float *gamma, const float *beta, void *y, float *mean, float *rstd, \
                                 int64_t n, int64_t p, int64_t c, int64_t g, double eps, int threads) {                   \
    forward((const T *)x, gamma, beta, (T *)y, mean, rstd, n, p, c, g, eps, threads);                                     \
  }                                                                                                                       \
  extern "C" void backward_##NAME(const void *dy, const void *x, const float *gamma, const float *beta, const float *mean, \
                                  const float *rstd, void *dx, float *dgamma, float *dbeta, int64_t n, int64_t p,         \
                                  int64_t c, int64_t g, int threads) {                                                    \
    backward((const T *)dy, (const T *)x, gamma, beta, mean, rstd, (T *)dx, dgamma, dbeta, n, p, c, g, threads);          \
  }                                                                                                                       \
  extern "C" void standardize_##NAME(void *out, const float *w, float *mean, float *rstd, int64_t n, int64_t size,        \
                                     double eps, int threads) {                                                           \
    standardize(w, (T *)out, mean, rstd, n, size, eps, threads);                                                          \
  }                                                                                                                       \
  extern "C" void standardize_backward_##NAME(const void *up, const float *w, const float *mean, const float *rstd,       \
                                              float *dw, int64_t n, int64_t size, int threads) {                          \
    standardize_backward((const T *)up, w, mean, rstd, dw, n, size, threads);                                             \
  }
FUSED(float32, float)
FUSED(bfloat16, bf16)
