// What the files of the Python module share: arrays as they come, and what is asked of them before a pointer is followed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace nb = nanobind;

namespace kvfold {

template <class T>
using Array = nb::ndarray<T, nb::device::cpu>;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <class A>
void require_shape(const A& array, std::initializer_list<int64_t> shape, const char* what) {
  bool same = array.ndim() == shape.size();
  size_t axis = 0;
  for (int64_t size : shape) same = same && array.shape(axis) == static_cast<size_t>(size), axis++;
  if (!same) throw std::invalid_argument(std::string("shape of ") + what);
}

template <class A>
void require_dense(const A& array, const char* what) {
  if (array.size() == 0) return;
  int64_t stride = 1;
  for (size_t axis = array.ndim(); axis-- > 0; stride *= static_cast<int64_t>(array.shape(axis)))
    if (array.shape(axis) > 1 && array.stride(axis) != stride) throw std::invalid_argument(std::string(what) + " has gaps");
}

// float16, bfloat16
inline bool is_half(nb::dlpack::dtype type) {
  return type == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
}
inline bool is_bfloat16(nb::dlpack::dtype type) {
  return type == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
}

// Of `tokens` keys of `dim` in each of `batch` rows.
inline Turn turn_of(const Array<const int32_t>& positions, const Array<const float>& inv_freq, float factor, bool interleaved,
                    int64_t batch, int64_t tokens, int64_t dim) {
  const int64_t rows = positions.ndim() == 2 ? positions.shape(0) : 0;
  require(rows == 1 || rows == batch, "positions [B or 1, T]");
  require_shape(positions, {rows, tokens}, "positions, not [B or 1, T]");
  require_dense(positions, "positions");
  require(inv_freq.ndim() == 1 && 2 * static_cast<int64_t>(inv_freq.shape(0)) <= dim, "inv_freq [n], 2 n <= D");
  require_dense(inv_freq, "inv_freq");
  return {positions.data(), rows == 1 ? 0 : tokens, inv_freq.data(), static_cast<int64_t>(inv_freq.shape(0)), factor, interleaved};
}

void bind_coding(nb::module_& m);     // module_code.cpp
void bind_attention(nb::module_& m);  // module_attend.cpp

}  // namespace kvfold
