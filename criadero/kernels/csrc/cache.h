// Keys and values of all layers in pages. Who owns which page is the engine's business; here they are numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "ops.h"

namespace criadero {

KvType kv_type_named(const std::string& name);  // f32, f16, bf16, int8; throws std::invalid_argument for others
const char* name_of(KvType type);

class Cache {
   public:
    // `page`: positions in a page, a multiple of UNIT. Memory is taken from the system as pages are written. Throws std::invalid_argument
    // for sizes that make no sense, std::bad_alloc when the address space does not have them.
    Cache(int layers, int pages, int page, int kv_heads, int head_dim, KvType type);
    ~Cache();
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    const int layers, pages, page, kv_heads, head_dim;
    const KvType type;
    KvLayer layer(int index) const;
    size_t bytes() const { return size_; }  // when every page is in use

   private:
    KvLayer first_;
    size_t layer_bytes_ = 0, keys_bytes_ = 0, values_bytes_ = 0, scales_bytes_ = 0, size_ = 0;
    uint8_t* data_ = nullptr;
};

}  // namespace criadero
