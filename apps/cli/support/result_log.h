// Results of a long evaluation, kept as they come.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "eval/model_evaluation.h"

namespace tessera::cli {

/// A file of JSON lines: what the results belong to, then one line per result. A line cut short by a crash is dropped.
class ResultLog {
 public:
  /// Reads what the file has, and opens it to go on; an empty path keeps nothing. Throws Error for a file that belongs
  /// to something else, is no such log, or cannot be written.
  ResultLog(const std::string& path, const nlohmann::ordered_json& identity);

  std::optional<eval::EvaluationResult> find(const eval::EvaluationPoint& point) const;
  /// Writes the line through to the file. Throws Error when it does not get there.
  void add(const eval::EvaluationResult& result);

 private:
  std::string path_;
  std::ofstream file_;
  std::vector<eval::EvaluationResult> results_;
};

}  // namespace tessera::cli
