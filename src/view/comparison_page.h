// One HTML file, without a network: methods side by side, and what a few heads of each computed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "view/plan_map.h"

namespace tessera {

/// What one head computed under one method.
struct HeadMap {
  std::int64_t layer = 0;
  std::int64_t q_head = 0;
  PlanMap map;
};

/// One row of the table.
struct MethodResult {
  std::string method;      ///< as in SPEC
  std::string parameters;  ///< JSON, defaults filled in
  double density = 0;      ///< computed over allowed pairs, all layers and heads
  double prefill_ms = 0;
  double attention_ms = 0;  ///< plans and kernels of the prefill
  std::optional<double> bits_per_byte;
  std::string answer;  ///< what the model said
  bool found = false;  ///< whether that is the planted key
  std::vector<HeadMap> maps;
};

struct ComparisonPage {
  std::string model;
  std::string document;
  std::int64_t tokens = 0;
  std::string key;                    ///< planted
  std::int64_t key_position = 0;      ///< its token position
  std::string machine;                ///< instruction set, threads
  std::vector<MethodResult> results;  ///< the first is the one that speed-ups refer to
};

/// The printable ASCII of what a model said; other bytes as dots.
std::string printable(std::string_view text);

/// The page. Text from outside is escaped; pictures are PNG data URIs.
std::string html_of(const ComparisonPage& page);

}  // namespace tessera
