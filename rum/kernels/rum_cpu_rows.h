/* What the compiled cells share: row functions without branches, so that loops over them vectorise,
 * layer norm, and threads. Each file that includes this has copies of its own. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

#define LAYER_NORM_EPS 1e-3f
#define SMALL_STEP (1 << 13) /* elements of a step below which threads cost more than they bring */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* exp to 2 units in the last place, without branches, so that loops over it vectorise */
INLINE float exponential(float x)
{
    x = x > 88.3f ? 88.3f : (x < -87.3f ? -87.3f : x);
    float n = x * 1.44269504f;
    n = n + 12582912.0f;   /* rounds to a whole number */
    n = n - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale;
    scale.i = ((int32_t)n + 127) << 23;
    return p * scale.f;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

typedef struct { float mean, inverse_std; } Normal;

INLINE Normal moments(const float *x, int64_t n)
{
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    float mean = sum / (float)n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    Normal result = {mean, 1.0f / sqrtf(square / (float)n + LAYER_NORM_EPS)};
    return result;
}

INLINE void standardize(const float *x, float *out, int64_t n, Normal m)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = (x[i] - m.mean) * m.inverse_std;
}

/* gradient of x from that of its standard form `s`; adds to the gradients of gain and shift */
INLINE void norm_backward(
    float *grad, const float *s, const float *gain, float *grad_gain, float *grad_shift,
    int64_t n, float inverse_std)
{
    float mean = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : mean, along)
    for (int64_t i = 0; i < n; i++) {
        grad_gain[i] += grad[i] * s[i];
        grad_shift[i] += grad[i];
        grad[i] *= gain[i];
        mean += grad[i];
        along += grad[i] * s[i];
    }
    mean /= (float)n;
    along /= (float)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad[i] = (grad[i] - mean - s[i] * along) * inverse_std;
}
