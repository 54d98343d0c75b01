#include "io/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "core/error.h"

namespace tessera {

namespace {

static_assert(std::endian::native == std::endian::little, "numbers of the file are used as they lie");

constexpr std::string_view kMagic = "GGUF";
constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint32_t kMostAxes = 4;
/// Far above every file there is; each is also checked against the bytes that are left.
constexpr std::uint64_t kMostEntries = 1 << 20;
constexpr std::uint64_t kLongestName = 1 << 16;

/// Bytes of a number; 0 for strings, arrays and unknown types.
std::size_t size_of_number(std::uint32_t type) {
  constexpr std::array<std::size_t, 13> sizes{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < sizes.size() ? sizes[type] : 0;
}

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

std::string_view shortened(std::string_view text) {
  return text.substr(0, 80);
}

std::optional<std::int64_t> integer_at(GgufType type, const std::byte* p) {
  switch (type) {
    case GgufType::u8:
      return load<std::uint8_t>(p);
    case GgufType::i8:
      return load<std::int8_t>(p);
    case GgufType::u16:
      return load<std::uint16_t>(p);
    case GgufType::i16:
      return load<std::int16_t>(p);
    case GgufType::u32:
      return load<std::uint32_t>(p);
    case GgufType::i32:
      return load<std::int32_t>(p);
    case GgufType::i64:
      return load<std::int64_t>(p);
    case GgufType::u64: {
      const auto value = load<std::uint64_t>(p);
      if (value > static_cast<std::uint64_t>(INT64_MAX)) return std::nullopt;
      return static_cast<std::int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

/// One element as T; nothing if it has another type or does not fit.
template <class T>
std::optional<T> number_at(GgufType type, const std::byte* p);
template <>
std::optional<std::int64_t> number_at(GgufType type, const std::byte* p) {
  return integer_at(type, p);
}
template <>
std::optional<double> number_at(GgufType type, const std::byte* p) {
  if (type == GgufType::f32) return static_cast<double>(load<float>(p));
  if (type == GgufType::f64) return load<double>(p);
  const auto integer = integer_at(type, p);
  return integer ? std::optional(static_cast<double>(*integer)) : std::nullopt;
}
template <>
std::optional<bool> number_at(GgufType type, const std::byte* p) {
  if (type != GgufType::boolean) return std::nullopt;
  return load<std::uint8_t>(p) != 0;
}

template <class T>
constexpr std::string_view kExpected;
template <>
constexpr std::string_view kExpected<std::int64_t> = "an integer";
template <>
constexpr std::string_view kExpected<double> = "a number";
template <>
constexpr std::string_view kExpected<bool> = "true or false";
template <>
constexpr std::string_view kExpected<std::string> = "a text";

template <class T>
struct ElementOf {
  using type = T;
  static constexpr bool is_list = false;
};
template <class T>
struct ElementOf<std::vector<T>> {
  using type = T;
  static constexpr bool is_list = true;
};

/// Elements one after another, all within bounds as the header was checked.
template <class T>
std::optional<std::vector<T>> elements_of(GgufType type, std::uint64_t count, std::span<const std::byte> bytes) {
  std::vector<T> values;
  values.reserve(static_cast<std::size_t>(count));
  const std::byte* p = bytes.data();
  for (std::uint64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, std::string>) {
      if (type != GgufType::string) return std::nullopt;
      const auto length = static_cast<std::size_t>(load<std::uint64_t>(p));
      values.emplace_back(reinterpret_cast<const char*>(p + 8), length);
      p += 8 + length;
    } else {
      const auto value = number_at<T>(type, p);
      if (!value) return std::nullopt;
      values.push_back(*value);
      p += size_of_number(static_cast<std::uint32_t>(type));
    }
  }
  return values;
}

}  // namespace

/// Walks over the header; every step is checked against what is left.
class GgufFile::Reader {
 public:
  Reader(std::span<const std::byte> bytes, GgufFile& file) : bytes_(bytes), file_(file) {}

  void read() {
    const std::span<const std::byte> magic = take(4, "the magic number");
    require(std::memcmp(magic.data(), kMagic.data(), 4) == 0, "{}: is no GGUF file: it does not begin with 'GGUF'",
            file_.name_);
    const auto version = number<std::uint32_t>("the version");
    require(version == 2 || version == 3, "{}: GGUF version {} is not supported; supported: 2, 3 (little-endian)",
            file_.name_, version);
    const auto tensors = number<std::uint64_t>("the number of tensors");
    const auto values = number<std::uint64_t>("the number of metadata entries");
    require(tensors <= kMostEntries && values <= kMostEntries,
            "{}: says that it holds {} tensors and {} metadata entries; expected at most {} of each", file_.name_,
            tensors, values, kMostEntries);
    for (std::uint64_t i = 0; i < values; ++i) read_value();
    const std::uint64_t alignment = read_alignment();
    for (std::uint64_t i = 0; i < tensors; ++i) read_tensor(alignment);
    const std::uint64_t data = (at_ + alignment - 1) / alignment * alignment;
    require(data <= bytes_.size() || tensors == 0, "{}: ends before the data of its tensors", file_.name_);
    file_.data_ = bytes_.subspan(std::min<std::size_t>(data, bytes_.size()));
    check_tensors();
  }

 private:
  std::span<const std::byte> take(std::uint64_t count, std::string_view what) {
    require(count <= bytes_.size() - at_, "{}: ends within {} at byte {}: {} bytes wanted, {} left", file_.name_,
            shortened(what), at_, count, bytes_.size() - at_);
    const auto part = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += static_cast<std::size_t>(count);
    return part;
  }
  template <class T>
  T number(std::string_view what) {
    return load<T>(take(sizeof(T), what).data());
  }
  std::string name(std::string_view what) {
    const auto length = number<std::uint64_t>(what);
    require(length <= kLongestName, "{}: {} has {} bytes; expected at most {}", file_.name_, what, length,
            kLongestName);
    const auto part = take(length, what);
    return {reinterpret_cast<const char*>(part.data()), part.size()};
  }

  void skip_string(std::string_view what) { take(number<std::uint64_t>(what), what); }

  void read_value() {
    const std::string key = name("the name of a metadata entry");
    auto type = number<std::uint32_t>(key);
    std::uint64_t count = 1;
    const bool array = type == static_cast<std::uint32_t>(GgufType::array);
    if (array) {
      type = number<std::uint32_t>(key);
      count = number<std::uint64_t>(key);
    }
    const std::size_t size = size_of_number(type);
    const bool strings = type == static_cast<std::uint32_t>(GgufType::string);
    require(strings || size > 0, "{}: '{}' has values of type {}, which is not supported", file_.name_, shortened(key),
            type);
    const std::size_t begin = at_;
    if (strings) {
      require(count <= (bytes_.size() - at_) / 8, "{}: '{}' says that it holds {} texts; {} bytes are left",
              file_.name_, shortened(key), count, bytes_.size() - at_);
      for (std::uint64_t i = 0; i < count; ++i) skip_string(key);
    } else {
      require(count <= (bytes_.size() - at_) / size, "{}: '{}' says that it holds {} numbers; {} bytes are left",
              file_.name_, shortened(key), count, bytes_.size() - at_);
      take(count * size, key);
    }
    const Value value{static_cast<GgufType>(type), array, count, bytes_.subspan(begin, at_ - begin)};
    require(file_.values_.emplace(key, value).second, "{}: '{}' is there twice", file_.name_, shortened(key));
  }

  std::uint64_t read_alignment() const {
    const auto given = file_.get_optional<std::int64_t>("general.alignment");
    if (!given) return kDefaultAlignment;
    require(*given >= 1 && *given <= 1 << 20 && std::has_single_bit(static_cast<std::uint64_t>(*given)),
            "{}: 'general.alignment' is {}; expected a power of two", file_.name_, *given);
    return static_cast<std::uint64_t>(*given);
  }

  void read_tensor(std::uint64_t alignment) {
    const std::string tensor_name = name("the name of a tensor");
    GgufTensor tensor;
    const auto axes = number<std::uint32_t>(tensor_name);
    require(axes >= 1 && axes <= kMostAxes, "{}: tensor '{}' has {} axes; expected 1 to {}", file_.name_,
            shortened(tensor_name), axes, kMostAxes);
    // No product of sizes may pass 2^62: all are at least 1 and divided out one by one.
    std::uint64_t room = std::uint64_t{1} << 62;
    for (std::uint32_t i = 0; i < axes; ++i) {
      const auto size = number<std::uint64_t>(tensor_name);
      require(size >= 1 && size <= room,
              "{}: tensor '{}' has an axis of {}; expected at least 1 and fewer than 2^62 "
              "numbers in all",
              file_.name_, shortened(tensor_name), size);
      room /= size;
      tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
    }
    const auto type = number<std::uint32_t>(tensor_name);
    require(is_ggml_type(type), "{}: tensor '{}' has type {}, which is not supported; supported: {}", file_.name_,
            shortened(tensor_name), type, ggml_type_names());
    tensor.type = static_cast<GgmlType>(type);
    const GgmlBlock block = block_of(tensor.type);
    require(tensor.shape.back() % block.numbers == 0, "{}: tensor '{}' has rows of {} numbers; {} has blocks of {}",
            file_.name_, shortened(tensor_name), tensor.shape.back(), name_of(tensor.type), block.numbers);
    const auto blocks = static_cast<std::uint64_t>(tensor.elements() / block.numbers);
    require(blocks <= bytes_.size() / static_cast<std::uint64_t>(block.bytes),
            "{}: tensor '{}' needs {} blocks of {} bytes; the file has {} bytes", file_.name_, shortened(tensor_name),
            blocks, block.bytes, bytes_.size());
    tensor.bytes = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(block.bytes);
    const auto begin = number<std::uint64_t>(tensor_name);
    require(begin % alignment == 0, "{}: tensor '{}' begins at {}, which is no multiple of the alignment {}",
            file_.name_, shortened(tensor_name), begin, alignment);
    tensor.begin = static_cast<std::size_t>(begin);
    require(file_.tensors_.emplace(tensor_name, std::move(tensor)).second, "{}: tensor '{}' is there twice",
            file_.name_, shortened(tensor_name));
  }

  void check_tensors() const {
    std::vector<std::pair<const std::string*, const GgufTensor*>> order;
    for (const auto& [tensor_name, tensor] : file_.tensors_) {
      require(tensor.begin <= file_.data_.size() && tensor.bytes <= file_.data_.size() - tensor.begin,
              "{}: tensor '{}' lies at bytes {} to {} of the data, which has {}", file_.name_, shortened(tensor_name),
              tensor.begin, tensor.begin + tensor.bytes, file_.data_.size());
      order.emplace_back(&tensor_name, &tensor);
    }
    std::sort(order.begin(), order.end(),
              [](const auto& a, const auto& b) { return a.second->begin < b.second->begin; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const GgufTensor& before = *order[i - 1].second;
      require(before.begin + before.bytes <= order[i].second->begin, "{}: tensors '{}' and '{}' overlap", file_.name_,
              shortened(*order[i - 1].first), shortened(*order[i].first));
    }
  }

  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  GgufFile& file_;
};

std::int64_t GgufTensor::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t size : shape) product *= size;
  return product;
}

GgufFile GgufFile::open(const std::filesystem::path& path, FileMemory memory, int threads) {
  GgufFile file = parse(FileBytes(path), path.string());
  if (memory == FileMemory::copied) file = parse(FileBytes(path, memory, threads), path.string());
  return file;
}

GgufFile GgufFile::parse(FileBytes bytes, std::string name) {
  GgufFile file = parse(bytes.bytes(), std::move(name));
  file.file_ = std::move(bytes);
  return file;
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.name_ = std::move(name);
  Reader(bytes, file).read();
  return file;
}

std::vector<std::string> GgufFile::keys() const {
  std::vector<std::string> names;
  for (const auto& [key, value] : values_) names.push_back(key);
  return names;
}

const GgufTensor& GgufFile::tensor(std::string_view tensor) const {
  const auto found = tensors_.find(tensor);
  if (found != tensors_.end()) return found->second;
  std::vector<std::string> known;
  for (const auto& [name, info] : tensors_) known.push_back(name);
  fail("{}: tensor '{}' is missing{}", name_, tensor,
       known.empty() ? std::string() : fmt::format("; the nearest name is '{}'", nearest_name(tensor, known)));
}

const GgufFile::Value* GgufFile::find(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

template <class T>
std::optional<T> GgufFile::get_optional(std::string_view key) const {
  using Element = typename ElementOf<T>::type;
  constexpr bool is_list = ElementOf<T>::is_list;
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->array == is_list) {
    if (auto elements = elements_of<Element>(value->type, value->count, value->bytes)) {
      if constexpr (is_list) {
        return elements;
      } else {
        return (*elements)[0];
      }
    }
  }
  fail("{}: '{}' has another type; expected {}{}", name_, key, is_list ? "a list, each " : "", kExpected<Element>);
}

template <class T>
T GgufFile::get(std::string_view key) const {
  std::optional<T> value = get_optional<T>(key);
  require(value.has_value(), "{}: the key '{}' is missing; expected {}{}", name_, key,
          ElementOf<T>::is_list ? "a list, each " : "", kExpected<typename ElementOf<T>::type>);
  return *std::move(value);
}

template std::optional<std::int64_t> GgufFile::get_optional(std::string_view) const;
template std::optional<double> GgufFile::get_optional(std::string_view) const;
template std::optional<bool> GgufFile::get_optional(std::string_view) const;
template std::optional<std::string> GgufFile::get_optional(std::string_view) const;
template std::optional<std::vector<std::int64_t>> GgufFile::get_optional(std::string_view) const;
template std::optional<std::vector<double>> GgufFile::get_optional(std::string_view) const;
template std::optional<std::vector<bool>> GgufFile::get_optional(std::string_view) const;
template std::optional<std::vector<std::string>> GgufFile::get_optional(std::string_view) const;
template std::int64_t GgufFile::get(std::string_view) const;
template double GgufFile::get(std::string_view) const;
template bool GgufFile::get(std::string_view) const;
template std::string GgufFile::get(std::string_view) const;
template std::vector<std::int64_t> GgufFile::get(std::string_view) const;
template std::vector<double> GgufFile::get(std::string_view) const;
template std::vector<bool> GgufFile::get(std::string_view) const;
template std::vector<std::string> GgufFile::get(std::string_view) const;

}  // namespace tessera
