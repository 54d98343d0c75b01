// Plans as safetensors files.
#pragma once

#include "io/safetensors.h"
#include "tessera/plan.h"

namespace tessera {

/// The plan in an open file; throws Error for anything but a valid plan. load_plan() opens the file first.
///
/// Format "tessera-plan", version 1. Tensors: row_begin, entry_begin (I64); entries as columns entry_key (I64),
/// entry_count (I32), entry_kind, entry_mask (U8), entry_source (I32), entry_mask_index (I64); tokens (I32); mask_words
/// (I64, bit patterns); bands (I64 [n, 2]); query_order, key_order (I32, all blocks one after another) with
/// query_order_begin, key_order_begin (I64 [blocks + 1]; size 0 when the plan has none). Metadata: "format", "version"
/// and "plan", a JSON object with the problem, tile sizes, plan heads and sequences and the key sources.
Plan read_plan(const SafetensorsFile& file);

}  // namespace tessera
