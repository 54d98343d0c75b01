// Questions about long generated texts, with the answer known: what a model must find, follow, count or copy.
//
// Names and recipes follow RULER (arXiv 2404.06654), the Sparse Frontier (2504.17768) and zoology (2312.04927); all
// text is generated from the seed. docs/evaluating.md describes each.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tessera::eval {

/// How an answer is judged against the gold strings; every score lies in [0, 1].
enum class Scoring : std::uint8_t {
  contained,      ///< share of the gold strings that occur in the answer, letter case aside
  exact,          ///< share of the answer's lines, in order, that equal the gold ones but for case, spaces and articles
  overlap,        ///< intersection over union of the answer's words and the gold strings
  teacher_forced  ///< share of the gold text's tokens that the model predicts when it is fed the gold text
};

struct TaskInfo {
  std::string name;
  std::string summary;
  Scoring scoring = Scoring::contained;
  std::int64_t answer_tokens = 128;  ///< most tokens of an answer; longer ones are cut, so that guessing does not pay
};

/// One question.
struct TaskSample {
  std::string prompt;             ///< ends where the answer begins
  std::vector<std::string> gold;  ///< of teacher_forced: one string, fed as it is
  /// Byte ranges of the gold string whose tokens count (teacher_forced); empty: all of it.
  std::vector<std::pair<std::size_t, std::size_t>> labels = {};
  /// Byte ranges [first, end) of the prompt that hold what the answer needs.
  std::vector<std::pair<std::size_t, std::size_t>> needles = {};
  double depth = 0;  ///< place of the first needle in the prompt, 0 to 1
};

struct SampleOptions {
  std::int64_t length = 4096;  ///< tokens of the prompt and the longest answer together
  std::uint64_t seed = 0;      ///< sample k of a set uses seed + k
  /// The question stands before the text as well as after it: for methods that must know it to choose what to read.
  bool question_first = false;
  /// Tokens of a text; absent: its bytes.
  std::function<std::int64_t(std::string_view)> count_tokens = {};
};

/// All tasks, in the order of the documentation.
std::span<const TaskInfo> tasks();
/// Throws Error that suggests the nearest name.
const TaskInfo& find_task(std::string_view name);
/// A prompt that fills at least 90 % of the length, as far as the task's smallest unit allows. Equal options give equal
/// samples. Throws Error for a length that the task's needles do not fit into.
TaskSample make_sample(const TaskInfo& task, const SampleOptions& options);
/// Of what the model wrote. Throws Error for teacher_forced tasks, which have no written answer.
double score_answer(const TaskInfo& task, const TaskSample& sample, std::string_view answer);

}  // namespace tessera::eval
