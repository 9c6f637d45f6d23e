// Vectors over their stored scale, in groups and weighted, ready for the search (scale.cpp).
#pragma once

#include "kernels.h"

namespace kvfold {

// Those of tokens first..first+count-1 of one batch row and head, vectors [count][groups][dim]; their scales are stored. `sines` are
// those of these tokens (rope.h), [count][2][rotary], of a call that has a turn. False if there is NaN or Inf in them.
bool scaled_groups(const ScaleCall& call, const Stored& to, int64_t b, int64_t g, int64_t first, int64_t count, const float* sines,
                   float* vectors);

}  // namespace kvfold
