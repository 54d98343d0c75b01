#include "model/available_memory.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace tessera::model {

namespace {

/// The number behind a word at the start of a line.
std::optional<std::size_t> number_after(const char* path, const std::string& word) {
  std::ifstream file(path);
  std::string name;
  std::size_t number = 0;
  std::string rest;
  while (file >> name >> number) {
    if (name == word) return number;
    std::getline(file, rest);
  }
  return std::nullopt;
}

std::optional<std::size_t> number_in(const char* path) {
  std::ifstream file(path);
  std::size_t number = 0;
  if (file >> number) return number;
  return std::nullopt;  // "max" too
}

}  // namespace

std::optional<std::size_t> available_memory() {
  std::optional<std::size_t> available;
  if (const auto kilobytes = number_after("/proc/meminfo", "MemAvailable:")) available = *kilobytes * 1024;
  const auto limit = number_in("/sys/fs/cgroup/memory.max");
  const auto used = number_in("/sys/fs/cgroup/memory.current");
  if (limit && used) {
    const std::size_t files = number_after("/sys/fs/cgroup/memory.stat", "file").value_or(0);
    const std::size_t held = *used - std::min(*used, files);
    const std::size_t left = *limit - std::min(*limit, held);
    available = std::min(available.value_or(left), left);
  }
  return available;
}

}  // namespace tessera::model
