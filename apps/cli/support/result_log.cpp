#include "support/result_log.h"

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "core/error.h"
#include "io/atomic_file.h"

namespace tessera::cli {

namespace {

using Json = nlohmann::ordered_json;

Json to_json(const eval::EvaluationResult& result) {
  return {{"task", result.point.task},
          {"len", result.point.length},
          {"method", result.point.method},
          {"sample", result.point.sample},
          {"score", result.score},
          {"gold_bits", result.gold_bits ? Json(*result.gold_bits) : Json()},
          {"density", result.density},
          {"decode_density", result.decode_density},
          {"prefill_ms", result.prefill_ms},
          {"decode_ms", result.decode_ms},
          {"prompt_tokens", result.prompt_tokens},
          {"decode_tokens", result.decode_tokens},
          {"kept_tokens", result.kept_tokens},
          {"cache_mb", result.cache_mb},
          {"answer", result.answer}};
}

eval::EvaluationResult from_json(const Json& json) {
  eval::EvaluationResult result;
  result.point = {json.at("task"), json.at("len"), json.at("method"), json.at("sample")};
  result.score = json.at("score");
  if (!json.at("gold_bits").is_null()) result.gold_bits = json.at("gold_bits").get<double>();
  result.density = json.at("density");
  result.prefill_ms = json.at("prefill_ms");
  result.decode_ms = json.at("decode_ms");
  result.prompt_tokens = json.at("prompt_tokens");
  // Logs of earlier versions lack these.
  result.decode_density = json.value("decode_density", 0.0);
  result.decode_tokens = json.value("decode_tokens", std::int64_t{0});
  result.kept_tokens = json.value("kept_tokens", 0.0);
  result.cache_mb = json.at("cache_mb");
  result.answer = json.at("answer");
  return result;
}

/// Whole lines of a file; what follows the last line end is dropped.
std::vector<std::string> whole_lines(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  std::vector<std::string> lines;
  std::size_t begin = 0;
  for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', begin)) {
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

}  // namespace

ResultLog::ResultLog(const std::string& path, const Json& identity) : path_(path) {
  if (path.empty()) return;
  const std::string head = identity.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::vector<std::string> lines;
  if (std::filesystem::exists(path)) lines = whole_lines(path);
  if (!lines.empty()) {
    require(lines.front() == head, "{}: holds results of {}; expected {}", path, lines.front().substr(0, 300), head);
  }
  std::string kept = head + "\n";
  for (std::size_t i = 1; i < lines.size(); ++i) {
    try {
      results_.push_back(from_json(Json::parse(lines[i])));
    } catch (const Json::exception&) {
      fail("{}: line {} is no result", path, i + 1);
    }
    kept += lines[i] + "\n";
  }
  // Written anew without a last line that was cut short, then appended to.
  AtomicFile file(path);
  file.write(kept);
  file.commit();
  file_.open(path, std::ios::binary | std::ios::app);
  require(file_.good(), "{}: cannot be written", path);
}

std::optional<eval::EvaluationResult> ResultLog::find(const eval::EvaluationPoint& point) const {
  const auto found = std::find_if(results_.begin(), results_.end(),
                                  [&](const eval::EvaluationResult& result) { return result.point == point; });
  if (found == results_.end()) return {};
  return *found;
}

void ResultLog::add(const eval::EvaluationResult& result) {
  if (path_.empty()) return;
  // Answers of byte models may be no UTF-8.
  file_ << to_json(result).dump(-1, ' ', false, Json::error_handler_t::replace) << '\n' << std::flush;
  require(file_.good(), "{}: cannot be written", path_);
}

}  // namespace tessera::cli
