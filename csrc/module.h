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

template <class T>
void require_dense(const Array<T>& array, const char* what) {
  if (array.size() == 0) return;
  int64_t stride = 1;
  for (size_t axis = array.ndim(); axis-- > 0; stride *= static_cast<int64_t>(array.shape(axis)))
    if (array.shape(axis) > 1 && array.stride(axis) != stride) throw std::invalid_argument(std::string(what) + " has gaps");
}

void bind_coding(nb::module_& m);     // module_code.cpp
void bind_attention(nb::module_& m);  // module_attend.cpp

}  // namespace kvfold
