// Adam and AdamW in one pass over memory on a CPU; called from cpu_adam.py through XLA's FFI.
//
// Parameters and moments are changed where they lie. The gradient of a large kernel is given as two factors; a few
// vectors of their product are worked out in registers, used up and forgotten. One thread works on a call; a study has
// a member for every core.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kAcross = 8;  // vectors of sums in a tile
typedef float Vector __attribute__((vector_size(kVectorBytes)));

// What an update is made of, as adam.py hands it over.
struct Terms {
  float keep_mean, add_mean, keep_square, add_square, mean_scale, square_scale, rate, weight_decay, epsilon;
};

// Values next to one another, each with its own gradient.
template <bool kDecoupled>
void update(const Terms& terms, std::size_t count, const float* __restrict gradients, float* __restrict params,
            float* __restrict means, float* __restrict squares) {
  for (std::size_t n = 0; n < count; ++n) {
    const float gradient = kDecoupled ? gradients[n] : gradients[n] + terms.weight_decay * params[n];
    means[n] = terms.keep_mean * means[n] + terms.add_mean * gradient;
    squares[n] = terms.keep_square * squares[n] + terms.add_square * gradient * gradient;
    const float change = means[n] * terms.mean_scale / (std::sqrt(squares[n] * terms.square_scale) + terms.epsilon);
    params[n] -= terms.rate * (kDecoupled ? change + terms.weight_decay * params[n] : change);
  }
}

// A kernel's gradient is left (N, D), turned, by right (N, K).
struct Kernel {
  std::size_t depth, width;  // D, K
  int count;                 // N
  const float *left, *right;
  float *params, *means, *squares;  // (D, K)
};

// A tile of it, of one row, is worked out and used up at once, so that a core multiplies for the next one while it
// waits for the memory of this.
template <bool kDecoupled, int kVectors>
inline void update_tile(const Terms& terms, const Kernel& of, std::size_t row, std::size_t column) {
  Vector tile[kVectors] = {};
  const float *left = of.left + row, *right = of.right + column;
  for (int n = 0; n < of.count; ++n, left += of.depth, right += of.width)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vector across;
      std::memcpy(&across, right + v * kLanes, sizeof across);
      tile[v] += *left * across;
    }
  float gradients[kVectors * kLanes];
  std::memcpy(gradients, tile, sizeof gradients);
  const std::size_t from = row * of.width + column;
  update<kDecoupled>(terms, kVectors * kLanes, gradients, of.params + from, of.means + from, of.squares + from);
}

template <bool kDecoupled>
void update_kernel(const Terms& terms, const Kernel& of) {
  for (std::size_t row = 0; row < of.depth; ++row) {
    std::size_t column = 0;
    for (; column + kAcross * kLanes <= of.width; column += kAcross * kLanes)
      update_tile<kDecoupled, kAcross>(terms, of, row, column);
    for (; column + kLanes <= of.width; column += kLanes) update_tile<kDecoupled, 1>(terms, of, row, column);
    for (; column < of.width; ++column) {
      float gradient = 0.0f;
      for (int n = 0; n < of.count; ++n) gradient += of.left[n * of.depth + row] * of.right[n * of.width + column];
      const std::size_t from = row * of.width + column;
      update<kDecoupled>(terms, 1, &gradient, of.params + from, of.means + from, of.squares + from);
    }
  }
}

// Whether to update at all, terms, and an array after another: parameters, means, squares, and their gradient or, where
// `factored` says so, its two factors. Results are parameters, means and squares of each, where those given lie.
template <bool kDecoupled>
void update_all(const Terms& terms, const ffi::RemainingArgs& given, const ffi::RemainingRets& results,
                ffi::Span<const std::int64_t> factored) {
  std::size_t next = 0;
  for (std::size_t number = 0; number < factored.size(); ++number) {
    float* of[3];
    for (int n = 0; n < 3; ++n) of[n] = (*results.get<ffi::AnyBuffer>(3 * number + n))->typed_data<float>();
    const auto params = *given.get<ffi::AnyBuffer>(next), first = *given.get<ffi::AnyBuffer>(next + 3);
    if (factored[number]) {
      const auto second = *given.get<ffi::AnyBuffer>(next + 4);
      const auto sides = params.dimensions();
      update_kernel<kDecoupled>(terms, {static_cast<std::size_t>(sides[0]), static_cast<std::size_t>(sides[1]),
                                        static_cast<int>(first.dimensions()[0]), first.typed_data<float>(),
                                        second.typed_data<float>(), of[0], of[1], of[2]});
    } else {
      update<kDecoupled>(terms, params.element_count(), first.typed_data<float>(), of[0], of[1], of[2]);
    }
    next += factored[number] ? 5 : 4;
  }
}

ffi::Error handle(ffi::BufferR0<ffi::PRED> wanted, ffi::BufferR1<ffi::F32> terms, ffi::RemainingArgs given,
                  ffi::RemainingRets results, bool decoupled, ffi::Span<const std::int64_t> factored) {
  if (!*wanted.typed_data()) return ffi::Error::Success();
  Terms told;
  std::memcpy(&told, terms.typed_data(), sizeof told);
  if (decoupled)
    update_all<true>(told, given, results, factored);
  else
    update_all<false>(told, given, results, factored);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_adam, handle,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR0<ffi::PRED>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("decoupled")
                                  .Attr<ffi::Span<const std::int64_t>>("factored"));
