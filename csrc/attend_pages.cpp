// Attention of rows of one query each over pages: the codes of a row lie in the pages that its row of the block table lists.
//
// A row's codes are copied together first, a page and head at a time, into memory of the thread's own, so kernels know nothing of
// pages. That is a seventh of what attention over dense pages has to read, it stays in the second-level cache, and the kernels
// would have waited for it likewise.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace kvfold {
namespace {

constexpr int64_t kPiece = 8192;  // keys of a row that are attended in one piece: there are other rows to share out

// The codes and scales of `length` tokens of one row and KV head, as they lie in pages, one behind the other.
void gather(const PagesCall& call, int64_t row, int64_t g, int64_t length, uint8_t* to) {
  const int64_t stride = call.key.token_stride, count = (length + call.block - 1) / call.block;
  const auto page_of = [&](int64_t i) {
    const int64_t page = call.table[row * call.table_stride + i];
    if (page < 0 || page >= call.pages) throw std::invalid_argument("a page that is not there");
    return call.first + page * call.key.batch_stride + g * call.key.head_stride;
  };
  const uint8_t* from = page_of(0);
  for (int64_t i = 0; i < count; i++) {
    const uint8_t* const next = i + 1 < count ? page_of(i + 1) : from;
    const int64_t some = std::min(call.block, length - i * call.block);
    for (int64_t at = 0; next != from && at < call.block * stride; at += 64) __builtin_prefetch(next + at, 0, 2);
    std::memcpy(to + i * call.block * stride, from, (some - 1) * stride + call.record);
    from = next;
  }
}

// `side` of what was gathered at `at`, heads from `head` on, `head_stride` bytes apart.
Side gathered(const Side& side, const uint8_t* first, const uint8_t* at, int64_t head, int64_t head_stride) {
  Side own = side;
  own.packed = at + (side.packed - first);
  own.scale = at + (static_cast<const uint8_t*>(side.scale) - first);
  own.head_stride = head_stride;
  own.scale_head_stride = head_stride / (side.short_scale ? 1 : 2);
  own.head = head;
  return own;
}

// KV heads head..head+count-1 of a row.
void attend_heads(const PagesCall& call, int64_t row, int64_t head, int64_t count, int threads) {
  const int64_t length = call.lengths[row], shared = call.row.shared, place = (row * call.row.kv_heads + head) * shared;
  AttendCall own = call.row;
  own.query += place * call.key.dim;
  own.out += place * call.value.dim;
  own.kv_heads = count;
  if (length == 0) {
    std::fill_n(own.out, count * shared * call.value.dim, 0.0f);
    return;
  }
  thread_local Aligned<uint8_t> codes;
  thread_local std::vector<float> lse;
  const int64_t head_stride = (length * call.key.token_stride + 63) / 64 * 64;
  codes.resize(count * head_stride);
  lse.resize(count * shared);
  uint8_t* const at = codes.data();
  parallel_for(threads, count, [&](int64_t i) { gather(call, row, head + i, length, at + i * head_stride); });
  own.lse = lse.data();
  own.tokens = length;
  own.key = gathered(call.key, call.first, at, head, head_stride);
  own.value = gathered(call.value, call.first, at, head, head_stride);
  if (own.center) own.center += head * call.key.dim;
  own.threads = threads;
  own.pieces = count * ((length + kPiece - 1) / kPiece);
  attend(own);
}

}  // namespace

void attend_pages(const PagesCall& call) {
  const int threads = call.row.threads;
  const int64_t heads = call.row.kv_heads, items = call.rows * heads;
  if (items < 2 * threads) {  // too few to share out: every row by all threads
    for (int64_t row = 0; row < call.rows; row++) attend_heads(call, row, 0, heads, threads);
    return;
  }
  // A head's rows one after the other, so that its codebooks stay in the second-level cache; the longest first, so that threads end
  // together.
  std::vector<int64_t> order(call.rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return call.lengths[a] > call.lengths[b]; });
  parallel_for(threads, items, [&](int64_t item) { attend_heads(call, order[item % call.rows], item / call.rows, 1, 1); });
}

}  // namespace kvfold
