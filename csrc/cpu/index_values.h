// What index vectors must hold, checked on the CPU before anything is read or written.
#pragma once

#include <cstdint>

#include "../ops/jobs.h"

namespace saft::cpu {

// Whether entries [begin, end) of `indices` lie within [0, numel), and each is greater than the one before it; that of
// `begin` too, unless it is the first of all.
bool increase_below(const Indices& indices, int64_t begin, int64_t end, int64_t numel);

// Throws unless `holds`, with the message for indices that do not increase strictly within [0, limit): `of` says what
// there are `limit` of.
void require_increase_below(bool holds, int64_t limit, const char* name, const char* of = "elements of the tensor");

void require_increase_below(const Indices& indices, int64_t limit, const char* name,
                            const char* of = "elements of the tensor");

// Throws unless offsets[0, rows] rise from 0 to n without decreasing.
void require_offsets(const int32_t* offsets, int64_t rows, int64_t n);

// Throws unless columns[0, n) lie within [0, limit); `of` says what there are `limit` of.
void require_columns(const int32_t* columns, int64_t n, int64_t limit, const char* of);

}  // namespace saft::cpu
