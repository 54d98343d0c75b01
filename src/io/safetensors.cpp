#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/json.h"

namespace tessera {

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kLargestHeader = 100'000'000;  // the limit of the format's own library
constexpr std::size_t kDataAlignment = 64;           // of the data as a whole, in files that we write
constexpr std::string_view kMetadataKey = "__metadata__";

struct DTypeName {
  std::string_view name;
  DType dtype;
};
/// BOOL comes last: u8 is written as U8.
constexpr std::array<DTypeName, 8> kDtypeNames = {{{"F32", DType::f32},
                                                   {"BF16", DType::bf16},
                                                   {"F16", DType::f16},
                                                   {"F64", DType::f64},
                                                   {"U8", DType::u8},
                                                   {"I32", DType::i32},
                                                   {"I64", DType::i64},
                                                   {"BOOL", DType::u8}}};

/// Number of elements, or nothing when it does not fit.
std::optional<std::int64_t> product(std::span<const std::int64_t> shape) {
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) {
    if (size < 0 || (size != 0 && elements > std::numeric_limits<std::int64_t>::max() / size)) return std::nullopt;
    elements *= size;
  }
  return elements;
}

/// Bytes of a tensor; throws Error when the shape is negative or overflows.
std::size_t checked_size(std::string_view where, std::span<const std::int64_t> shape, DType dtype) {
  const auto elements = product(shape);
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  require(elements.has_value() && *elements <= std::numeric_limits<std::int64_t>::max() / size,
          "{}: shape [{}] is negative or too large", where, fmt::join(shape, ", "));
  return static_cast<std::size_t>(*elements * size);
}

TensorInfo read_tensor(const Json& entry, const std::string& where, std::size_t data_bytes) {
  TensorInfo tensor;
  tensor.dtype_name = get<std::string>(entry, "dtype", where);
  const auto* known = std::find_if(kDtypeNames.begin(), kDtypeNames.end(),
                                   [&](const DTypeName& candidate) { return candidate.name == tensor.dtype_name; });
  require(known != kDtypeNames.end(), "{}: dtype '{}' is not known; expected F32, BF16, F16, F64, U8, BOOL, I32 or I64",
          where, tensor.dtype_name.substr(0, 32));
  tensor.dtype = known->dtype;
  tensor.shape = get<std::vector<std::int64_t>>(entry, "shape", where);
  const auto offsets = get<std::vector<std::int64_t>>(entry, "data_offsets", where);
  require(offsets.size() == 2, "{}: data_offsets has {} numbers; expected 2", where, offsets.size());
  require(offsets[0] >= 0 && offsets[0] <= offsets[1] && offsets[1] <= static_cast<std::int64_t>(data_bytes),
          "{}: data_offsets [{}, {}] lie outside the {} bytes of data", where, offsets[0], offsets[1], data_bytes);
  tensor.begin = static_cast<std::size_t>(offsets[0]);
  tensor.end = static_cast<std::size_t>(offsets[1]);
  const std::size_t size = checked_size(where, tensor.shape, tensor.dtype);
  require(size == tensor.end - tensor.begin, "{}: shape [{}] of {} needs {} bytes; data_offsets [{}, {}] hold {}",
          where, fmt::join(tensor.shape, ", "), tensor.dtype_name, size, tensor.begin, tensor.end,
          tensor.end - tensor.begin);
  return tensor;
}

}  // namespace

std::int64_t TensorInfo::elements() const {
  return product(shape).value();
}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path, FileMemory memory, int threads) {
  SafetensorsFile file = parse(FileBytes(path), path.string());
  if (memory == FileMemory::copied) file = parse(FileBytes(path, memory, threads), path.string());
  return file;
}

SafetensorsFile SafetensorsFile::parse(FileBytes bytes, std::string name) {
  SafetensorsFile result = parse(bytes.bytes(), std::move(name));
  result.file_ = std::move(bytes);
  return result;
}

SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, std::string name) {
  SafetensorsFile result;
  result.name_ = std::move(name);
  result.read_header(bytes);
  return result;
}

void SafetensorsFile::read_header(std::span<const std::byte> bytes) {
  require(bytes.size() >= kLengthBytes, "{}: {} bytes are too few for a safetensors file", name_, bytes.size());
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<std::uint64_t>(std::to_integer<unsigned>(bytes[i])) << (8 * i);
  }
  require(header_bytes <= bytes.size() - kLengthBytes, "{}: the header claims {} bytes; the file has {} (truncated?)",
          name_, header_bytes, bytes.size());
  require(header_bytes <= kLargestHeader, "{}: a header of {} bytes is too large; expected at most {}", name_,
          header_bytes, kLargestHeader);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data() + kLengthBytes), header_bytes);
  require(text.starts_with('{'), "{}: the header does not start with '{{': not a safetensors file", name_);
  data_ = bytes.subspan(kLengthBytes + header_bytes);

  const Json header = parse_json(text, name_, {.bytes = kLargestHeader, .depth = 8});
  require(header.is_object(), "{}: the header is not an object", name_);
  for (const auto& [key, value] : header.items()) {
    if (key == kMetadataKey) {
      require(value.is_object(), "{}: __metadata__ is not an object", name_);
      for (const auto& [name, text_value] : value.items()) {
        require(text_value.is_string(), "{}: __metadata__ '{}' is not a string", name_, name);
        metadata_.emplace(name, text_value.get<std::string>());
      }
      continue;
    }
    tensors_.emplace(key, read_tensor(value, fmt::format("{}: tensor '{}'", name_, key), data_.size()));
  }

  // The format wants the data covered exactly once.
  std::vector<const std::pair<const std::string, TensorInfo>*> by_offset;
  for (const auto& tensor : tensors_) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::size_t end = 0;
  for (const auto* tensor : by_offset) {
    require(tensor->second.begin >= end, "{}: tensor '{}' overlaps the one before it ({} < {})", name_, tensor->first,
            tensor->second.begin, end);
    require(tensor->second.begin == end, "{}: {} bytes before tensor '{}' belong to no tensor", name_,
            tensor->second.begin - end, tensor->first);
    end = tensor->second.end;
  }
  require(end == data_.size(), "{}: {} bytes at the end belong to no tensor", name_, data_.size() - end);
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

const TensorInfo& SafetensorsFile::info(std::string_view tensor) const {
  const auto found = tensors_.find(tensor);
  if (found == tensors_.end()) {
    const std::vector<std::string> known = names();
    fail("{}: there is no tensor '{}'{}", name_, tensor,
         known.empty() ? std::string(": the file is empty")
                       : fmt::format("; the nearest name is '{}'", nearest_name(tensor, known)));
  }
  return found->second;
}

std::span<const std::byte> SafetensorsFile::bytes(std::string_view tensor) const {
  const TensorInfo& found = info(tensor);
  return data_.subspan(found.begin, found.end - found.begin);
}

std::span<const std::byte> SafetensorsFile::checked_bytes(std::string_view tensor,
                                                          const std::vector<DType>& expected) const {
  const TensorInfo& found = info(tensor);
  if (std::find(expected.begin(), expected.end(), found.dtype) == expected.end()) {
    std::vector<std::string_view> names;
    names.reserve(expected.size());
    for (const DType dtype : expected) names.push_back(name_of(dtype));
    fail("{}: tensor '{}' is {}; expected {}", name_, tensor, found.dtype_name, fmt::join(names, " or "));
  }
  return bytes(tensor);
}

void write_safetensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string, std::less<>>& metadata) {
  std::vector<const NamedTensor*> order;
  for (const NamedTensor& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(),
                   [](const NamedTensor* a, const NamedTensor* b) { return size_of(a->dtype) > size_of(b->dtype); });

  Json header = Json::object();
  if (!metadata.empty()) header[std::string(kMetadataKey)] = metadata;
  std::size_t end = 0;
  for (const NamedTensor* tensor : order) {
    require(!tensor->name.empty() && tensor->name != kMetadataKey && !header.contains(tensor->name),
            "{}: tensor name '{}' is empty, reserved or given twice", path.string(), tensor->name);
    const std::string where = fmt::format("{}: tensor '{}'", path.string(), tensor->name);
    const std::size_t size = checked_size(where, tensor->shape, tensor->dtype);
    require(size == tensor->bytes.size(), "{}: shape [{}] of {} needs {} bytes; got {}", where,
            fmt::join(tensor->shape, ", "), name_of(tensor->dtype), size, tensor->bytes.size());
    const auto* name = std::find_if(kDtypeNames.begin(), kDtypeNames.end(),
                                    [&](const DTypeName& known) { return known.dtype == tensor->dtype; });
    header[tensor->name] = {{"dtype", name->name}, {"shape", tensor->shape}, {"data_offsets", {end, end + size}}};
    end += size;
  }

  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    fail("{}: a tensor name or metadata is not valid UTF-8", path.string());
  }
  text.append((kDataAlignment - (kLengthBytes + text.size()) % kDataAlignment) % kDataAlignment, ' ');
  std::string length(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<char>(text.size() >> (8 * i) & 0xFF);

  AtomicFile file(path);
  file.write(length);
  file.write(text);
  for (const NamedTensor* tensor : order) file.write(tensor->bytes);
  file.commit();
}

}  // namespace tessera
