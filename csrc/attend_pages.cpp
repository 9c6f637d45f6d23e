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
  const Side& key = call.key;
  for (int64_t first = 0; first < length; first += call.block) {
    const int64_t page = call.table[row * call.table_stride + first / call.block], count = std::min(call.block, length - first);
    if (page < 0 || page >= call.pages) throw std::invalid_argument("a page that is not there");
    const uint8_t* from = call.first + page * key.batch_stride + g * key.head_stride;
    std::memcpy(to + first * key.token_stride, from, (count - 1) * key.token_stride + call.record);
  }
}

// `side` of what was gathered at `at`, heads `head_stride` bytes apart.
Side gathered(const Side& side, const uint8_t* first, const uint8_t* at, int64_t head_stride) {
  Side own = side;
  own.packed = at + (side.packed - first);
  own.scale = at + (static_cast<const uint8_t*>(side.scale) - first);
  own.head_stride = head_stride;
  own.scale_head_stride = head_stride / (side.short_scale ? 1 : 2);
  return own;
}

void attend_row(const PagesCall& call, int64_t row, int threads) {
  const int64_t length = call.lengths[row], heads = call.row.kv_heads * call.row.shared;
  AttendCall own = call.row;
  own.query += row * heads * call.key.dim;
  own.out += row * heads * call.value.dim;
  if (length == 0) {
    std::fill_n(own.out, heads * call.value.dim, 0.0f);
    return;
  }
  thread_local std::vector<uint8_t> codes;
  thread_local std::vector<float> lse;
  const int64_t head_stride = (length * call.key.token_stride + 63) / 64 * 64;
  codes.resize(call.row.kv_heads * head_stride);
  lse.resize(heads);
  uint8_t* const at = codes.data();
  parallel_for(threads, call.row.kv_heads, [&](int64_t g) { gather(call, row, g, length, at + g * head_stride); });
  own.lse = lse.data();
  own.tokens = length;
  own.key = gathered(call.key, call.first, at, head_stride);
  own.value = gathered(call.value, call.first, at, head_stride);
  own.threads = threads;
  own.pieces = own.kv_heads * ((length + kPiece - 1) / kPiece);
  attend(own);
}

}  // namespace

void attend_pages(const PagesCall& call) {
  const int threads = call.row.threads;
  if (call.rows < 2 * threads) {  // too few to share out: every row by all threads
    for (int64_t row = 0; row < call.rows; row++) attend_row(call, row, threads);
    return;
  }
  std::vector<int64_t> order(call.rows);  // the longest first, so that threads end together
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return call.lengths[a] > call.lengths[b]; });
  parallel_for(threads, call.rows, [&](int64_t item) { attend_row(call, order[item], 1); });
}

}  // namespace kvfold
