// What the window attention ops share: which tokens the windows of a map have, along one side of the map, after a
// cyclic shift. No torch header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ASVIT_FAST_HOST_DEVICE __host__ __device__
#else
#define ASVIT_FAST_HOST_DEVICE
#endif

namespace asvit_fast {

// One side of the map, cut into windows after a cyclic shift by `shift` < window. Where there is no shift, keys may
// come from `margin` tokens more on either side of a window.
struct WindowAxis {
  int64_t size, window, shift;
  int64_t margin = 0;
};

// What becomes of windows at the edges of the map, as asvit_fast/ops/windows.py describes it.
enum class WindowLayout { masked, timm, torchvision, grid };

namespace {  // one copy per including file: nothing compiled for one instruction set may be linked into another

// Where running maxima begin: no score but -infinity is lower, a bias that masks with the lowest number is not.
template <typename T>
constexpr T kLowest = sizeof(T) == sizeof(float) ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

// A run of tokens along one side of the map that attend each other: a window, less what lies beyond the map, or one of
// the two parts that only the shift brings together in the last window.
struct WindowSegment {
  int64_t start;   // on the map
  int64_t length;  // >= 1
  int64_t offset;  // of the first token in its window
};

ASVIT_FAST_HOST_DEVICE inline int64_t segment_count(const WindowAxis& axis) {
  const int64_t rest = axis.size > axis.shift ? axis.size - axis.shift : 0;
  return (axis.shift > 0 && axis.size > 0 ? 1 : 0) + (rest + axis.window - 1) / axis.window;
}

ASVIT_FAST_HOST_DEVICE inline WindowSegment segment_at(const WindowAxis& axis, int64_t index) {
  if (axis.shift > 0 && index == 0)  // what the shift moved from the front to the end of the last window
    return {0, axis.shift < axis.size ? axis.shift : axis.size, axis.window - axis.shift};
  const int64_t start = axis.shift + (index - (axis.shift > 0 ? 1 : 0)) * axis.window;
  const int64_t rest = axis.size - start;
  return {start, rest < axis.window ? rest : axis.window, 0};
}

// In the layout "masked" a window that the shift brings together from two parts is two windows.
inline int64_t axis_windows(const WindowAxis& axis, WindowLayout layout) {
  return layout == WindowLayout::masked ? segment_count(axis) : (axis.size + axis.window - 1) / axis.window;
}

struct AxisToken {
  int64_t position;  // on the map; -1: padding
  int32_t offset;    // in the whole window, as the bias counts
  int32_t region;    // 0 or 1
};

// One window along one side: token(i) for 0 <= i < length.
struct AxisWindow {
  WindowAxis axis;
  WindowLayout layout;
  int64_t index, length, windows;
  WindowSegment segment;

  AxisWindow(const WindowAxis& axis, WindowLayout layout, int64_t index)
      : axis(axis), layout(layout), index(index), length(axis.window), windows(axis_windows(axis, layout)), segment{} {
    this->axis.margin = 0;  // of keys only
    if (layout != WindowLayout::masked) return;
    segment = segment_at(axis, index);
    length = segment.length;
  }

  // Its keys, where the axis has a margin.
  static AxisWindow keys(const WindowAxis& axis, WindowLayout layout, int64_t index) {
    AxisWindow window(axis, layout, index);
    const int64_t start = index * axis.window - axis.margin, length = axis.window + 2 * axis.margin;
    const int64_t begin = start < 0 ? 0 : start, end = start + length < axis.size ? start + length : axis.size;
    window.segment = layout == WindowLayout::masked ? WindowSegment{begin, end - begin, begin - start}
                                                    : WindowSegment{start, length, 0};
    window.length = window.segment.length;
    window.axis.margin = axis.margin;
    return window;
  }

  AxisToken token(int64_t i) const {
    const auto offset = static_cast<int32_t>(i);
    if (layout == WindowLayout::masked) return {segment.start + i, offset + static_cast<int32_t>(segment.offset), 0};
    if (layout == WindowLayout::grid) return {i * windows + index, offset, 0};
    if (axis.margin > 0) {
      const int64_t at = segment.start + i;
      return {at >= 0 && at < axis.size ? at : -1, offset, 0};
    }
    const int64_t padded = windows * axis.window;
    const int64_t place = index * axis.window + i;  // on the map as it is rolled and padded
    const int64_t around = layout == WindowLayout::timm ? axis.size : padded;
    int64_t position = place < around ? place + axis.shift : padded;
    if (place < around && position >= around) position %= around;
    const bool moved = axis.shift > 0 && place >= padded - axis.shift;
    return {position < axis.size ? position : -1, offset, moved ? 1 : 0};
  }
};

}  // namespace
}  // namespace asvit_fast
