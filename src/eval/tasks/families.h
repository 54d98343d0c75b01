// The recipes of the tasks, one file per family.
#pragma once

#include "eval/tasks/task.h"

namespace tessera::eval {

/// Needles in a haystack: passkey and the niah tasks (needles.cpp).
TaskSample make_needles(const TaskInfo& task, const SampleOptions& options);
/// Variable tracking (tracing.cpp).
TaskSample make_tracing(const TaskInfo& task, const SampleOptions& options);
/// Common and frequent words (word_counts.cpp).
TaskSample make_word_counts(const TaskInfo& task, const SampleOptions& options);
/// Associative recall, copying, sorting (sequences.cpp).
TaskSample make_sequences(const TaskInfo& task, const SampleOptions& options);
/// Chapters of a story and questions about them (story.cpp).
TaskSample make_story(const TaskInfo& task, const SampleOptions& options);

/// Streams of random numbers that the families draw from, so that they do not share any.
enum TaskStream : std::int64_t { needle_stream = 1, tracing_stream, count_stream, sequence_stream, story_stream };

}  // namespace tessera::eval
