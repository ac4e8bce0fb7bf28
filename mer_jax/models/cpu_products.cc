// Products of few rows with a large kernel on a CPU; called from cpu_products.py through XLA's FFI.
//
// The kernel is read once, from its first row to its last, and the next part of it is fetched while a part is
// multiplied. Neither it nor the rows are packed beforehand or turned afterwards. One thread works on a call; a study
// has a member for every core.
//
// Every sum of project() runs over its terms in order, whatever else is summed up beside it, so that a row's bits
// depend on neither its neighbours nor its place.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 6, kAcross = 4;  // of a tile of sums, which fill 24 of 32 registers
constexpr int kKernelRows = 24;        // the same
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 6, kAcross = 2;  // 12 of 16
constexpr int kKernelRows = 12;
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 6, kAcross = 2;
constexpr int kKernelRows = 12;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kDeep = 64;  // rows of a kernel that are worked on at a time
constexpr int kLine = 64 / sizeof(float);
typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t Pairs __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

// Adds products of kR rows with `deep` rows of the kernel to kV vectors of the results. The first rows of all have the
// kernel's next part fetched.
template <int kR, int kV>
void add_tile(const float* rows, std::size_t depth, const float* kernel, std::size_t width, int deep, float* results,
              bool first) {
  Vector tile[kR][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) tile[r][v] = load(results + r * width + v * kLanes);
  for (int d = 0; d < deep; ++d, kernel += width) {
    Vector across[kV];
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) across[v] = load(kernel + v * kLanes);
    if (first)
#pragma GCC unroll 8
      for (int from = 0; from < kV * kLanes; from += kLine) __builtin_prefetch(kernel + kDeep * width + from, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) tile[r][v] += rows[r * depth + d] * across[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) store(results + r * width + v * kLanes, tile[r][v]);
}

// The same for all columns; those beyond the last full vector one by one.
template <int kR>
void add_rows(const float* rows, std::size_t depth, const float* kernel, std::size_t width, int deep, float* results,
              bool first) {
  std::size_t column = 0;
  for (; column + kAcross * kLanes <= width; column += kAcross * kLanes)
    add_tile<kR, kAcross>(rows, depth, kernel + column, width, deep, results + column, first);
  for (; column + kLanes <= width; column += kLanes)
    add_tile<kR, 1>(rows, depth, kernel + column, width, deep, results + column, first);
  for (; column < width; ++column)
    for (int r = 0; r < kR; ++r)
      for (int d = 0; d < deep; ++d) results[r * width + column] += rows[r * depth + d] * kernel[d * width + column];
}

// rows (N, D) by kernel (D, K) to results (N, K).
void project(std::size_t count, std::size_t depth, std::size_t width, const float* rows, const float* kernel,
             float* results) {
  std::fill_n(results, count * width, 0.0f);
  for (std::size_t from = 0; from < depth; from += kDeep) {
    const int deep = static_cast<int>(std::min<std::size_t>(kDeep, depth - from));
    const float* const part = kernel + from * width;
    for (std::size_t row = 0; row < count;) {
      const auto add = [&](auto add_some, std::size_t some) {
        add_some(rows + row * depth + from, depth, part, width, deep, results + row * width, row == 0);
        row += some;
      };
      if (row + kRows <= count)
        add(add_rows<kRows>, kRows);
      else if (row + 4 <= count)
        add(add_rows<4>, 4);
      else if (row + 2 <= count)
        add(add_rows<2>, 2);
      else
        add(add_rows<1>, 1);
    }
  }
}

// kD rows of the kernel by as many rows as there are lanes, to kD columns of the results. Rows are turned, (K, lanes),
// or where they fill half of the lanes at most, (K / 2, lanes / 2, 2): two terms of each sum at a time.
template <int kD, bool kPairs>
void multiply(const Vector* turned, const float* kernel, std::size_t width, float* results, std::size_t depth,
              std::size_t count) {
  constexpr int kStep = kPairs ? 2 : 1;
  Vector sums[kD] = {};
  const float* ahead = kernel + kD * width;
  for (std::size_t k = 0; k < width; k += kStep, ahead += kStep * kD) {
    const Vector rows = *turned++;
#pragma GCC unroll 4
    for (int from = 0; from < kStep * kD; from += kLine) __builtin_prefetch(ahead + from, 0, 2);
#pragma GCC unroll 24
    for (int d = 0; d < kD; ++d) {
      if constexpr (kPairs) {
        std::int64_t pair;
        std::memcpy(&pair, kernel + d * width + k, sizeof pair);
        sums[d] += reinterpret_cast<Vector>(Pairs{} + pair) * rows;
      } else {
        sums[d] += kernel[d * width + k] * rows;
      }
    }
  }
  float values[kD][kLanes];
  std::memcpy(values, sums, sizeof values);
  for (std::size_t row = 0; row < count; ++row)
#pragma GCC unroll 24
    for (int d = 0; d < kD; ++d)
      results[row * depth + d] = kPairs ? values[d][2 * row] + values[d][2 * row + 1] : values[d][row];
}

template <bool kPairs>
void multiply_all(const Vector* turned, const float* kernel, std::size_t width, float* results, std::size_t depth,
                  std::size_t count) {
  std::size_t d = 0;
  for (; d + kKernelRows <= depth; d += kKernelRows)
    multiply<kKernelRows, kPairs>(turned, kernel + d * width, width, results + d, depth, count);
  for (; d < depth; ++d) multiply<1, kPairs>(turned, kernel + d * width, width, results + d, depth, count);
}

// rows (N, K) by kernel (D, K), turned, to results (N, D).
void project_back(std::size_t count, std::size_t depth, std::size_t width, const float* rows, const float* kernel,
                  float* results) {
  std::vector<Vector> turned(width);
  float* const to = reinterpret_cast<float*>(turned.data());
  if (2 * count <= kLanes && width % 2 == 0) {
    for (std::size_t k = 0; k < width; ++k)
      for (std::size_t row = 0; row < count; ++row) to[k / 2 * kLanes + 2 * row + k % 2] = rows[row * width + k];
    multiply_all<true>(turned.data(), kernel, width, results, depth, count);
    return;
  }
  for (std::size_t from = 0; from < count; from += kLanes, rows += kLanes * width, results += kLanes * depth) {
    const std::size_t some = std::min<std::size_t>(kLanes, count - from);
    std::fill(turned.begin(), turned.end(), Vector{});
    for (std::size_t k = 0; k < width; ++k)
      for (std::size_t row = 0; row < some; ++row) to[k * kLanes + row] = rows[row * width + k];
    multiply_all<false>(turned.data(), kernel, width, results, depth, some);
  }
}

using Floats = ffi::BufferR2<ffi::F32>;

std::size_t side(const Floats& array, int axis) { return static_cast<std::size_t>(array.dimensions()[axis]); }

ffi::Error handle_project(Floats rows, Floats kernel, ffi::Result<Floats> results) {
  project(side(rows, 0), side(kernel, 0), side(kernel, 1), rows.typed_data(), kernel.typed_data(),
          results->typed_data());
  return ffi::Error::Success();
}

ffi::Error handle_project_back(Floats rows, Floats kernel, ffi::Result<Floats> results) {
  project_back(side(rows, 0), side(kernel, 0), side(kernel, 1), rows.typed_data(), kernel.typed_data(),
               results->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_project, handle_project,
                              ffi::Ffi::Bind().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_project_back, handle_project_back,
                              ffi::Ffi::Bind().Arg<Floats>().Arg<Floats>().Ret<Floats>());
