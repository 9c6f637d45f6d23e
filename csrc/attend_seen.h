// Which keys a query sees: all, those of a mask, or those of a few spans.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "lanes_avx512.h"

namespace kvfold {

constexpr int64_t kSeen = 64;  // keys that are told at once

inline bool sees_all(const AttendCall& call) { return !call.mask && !call.spans; }

// Bits `first` to `last - 1`.
inline uint64_t run_of_bits(int64_t first, int64_t last) { return first < last ? ~uint64_t{0} >> (64 - (last - first)) << first : 0; }

// Which of `count` keys from `first` on a query sees, a bit each; kSeen at most.
inline uint64_t keys_seen(const AttendCall& call, int64_t b, int64_t query, int64_t first, int64_t count) {
  if (call.spans) {
    const int32_t* span = call.spans + query * call.span_count * 2;
    uint64_t seen = 0;
    for (int64_t i = 0; i < call.span_count; i++, span += 2)
      seen |= run_of_bits(std::max<int64_t>(span[0] - first, 0), std::min(span[1] - first, count));
    return seen;
  }
  if (!call.mask) return run_of_bits(0, count);
  const uint8_t* mask = call.mask + b * call.mask_batch_stride + query * call.mask_query_stride + first * call.mask_token_stride;
#if defined(__AVX512BW__)
  if (call.mask_token_stride == 1) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(run_of_bits(0, count), mask);
    return _mm512_test_epi8_mask(bytes, bytes);
  }
#endif
  uint64_t seen = 0;
  for (int64_t t = 0; t < count; t++) seen |= static_cast<uint64_t>(mask[t * call.mask_token_stride] != 0) << t;
  return seen;
}

// The others of them.
inline uint64_t keys_hidden(const AttendCall& call, int64_t b, int64_t query, int64_t first, int64_t count) {
  return run_of_bits(0, count) & ~keys_seen(call, b, query, first, count);
}

// False if spans tell that none of `count` queries sees any of the keys `first` to `last - 1`; masks are not looked at.
inline bool any_seen(const AttendCall& call, int64_t query, int64_t count, int64_t first, int64_t last) {
  if (!call.spans) return true;
  const int32_t* span = call.spans + query * call.span_count * 2;
  for (int64_t i = 0; i < count * call.span_count; i++, span += 2)
    if (std::max<int64_t>(span[0], first) < std::min<int64_t>(span[1], last)) return true;
  return false;
}

}  // namespace kvfold
