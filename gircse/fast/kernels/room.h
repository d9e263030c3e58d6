// Memory that a thread keeps: what is allocated anew at every call, the system clears every time.
#pragma once

#include <cstdint>
#include <vector>

namespace
{

constexpr int LINE = 64; // bytes of the processor's cache that lie together

class Room
{
    std::vector<char> bytes;

  public:
    char *take(size_t size)
    {
        if (bytes.size() < size + LINE)
            bytes.resize(size + LINE);
        return (char *)(((uintptr_t)bytes.data() + LINE - 1) / LINE * LINE);
    }
};

} // namespace
