// Runs one product as Python does, for processors that are emulated and for sanitizers: numbers come by standard input,
// floats leave by standard output. Arguments: instructions, how, outputs, depth, largest, count, and which of multiplier,
// zero_point, row_multiplier and term there are, each 0 or 1, and one_range.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Packed;
extern "C" {
Packed* dfqsam_pack(const char*, int, const int8_t*, const uint8_t*, const float*, const float*, int64_t, int64_t,
                    int64_t);
void dfqsam_unpack(Packed*);
void dfqsam_product(const Packed*, const uint8_t*, const float*, const int32_t*, const int32_t*, const int32_t*, float*,
                    int64_t, int, int);
}

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (static_cast<int64_t>(std::fread(values.data(), sizeof(T), count, stdin)) != count) std::exit(3);
  return values;
}

template <typename T>
const T* or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

int main(int count_of, char** arguments) {
  if (count_of != 12) return 2;
  auto number = [&](int i) { return std::atoll(arguments[i]); };
  const int64_t outputs = number(3), depth = number(4), largest = number(5), count = number(6);
  const int64_t groups = (depth + 31) / 32;
  const auto weight = read<int8_t>(outputs * depth);
  const auto weight_scale = read<float>(outputs), bias = read<float>(outputs);
  const auto rows = read<uint8_t>(count * depth);
  const auto scale = read<float>(number(11) ? 1 : count);
  const auto multiplier = read<uint8_t>(number(7) ? outputs * groups : 0);
  const auto zero_point = read<int32_t>(number(8) ? static_cast<int64_t>(scale.size()) : 0);
  const auto row_multiplier = read<int32_t>(number(9) ? count * groups : 0);
  const auto term = read<int32_t>(number(10) ? count : 0);
  Packed* packed = dfqsam_pack(arguments[1], static_cast<int>(number(2)), weight.data(), or_null(multiplier),
                               weight_scale.data(), bias.data(), outputs, depth, largest);
  if (packed == nullptr) return 4;
  std::vector<float> out(count * outputs);
  dfqsam_product(packed, rows.data(), scale.data(), or_null(zero_point), or_null(row_multiplier), or_null(term),
                 out.data(), count, number(11) != 0, 0);
  dfqsam_unpack(packed);
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  return 0;
}
