#include "cache.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>

namespace criadero {

namespace {

size_t size_of(KvType type) { return type == KvType::f32 ? 4 : type == KvType::int8 ? 1 : 2; }
size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

KvType kv_type_named(const std::string& name) {
    for (KvType type : {KvType::f32, KvType::f16, KvType::bf16, KvType::int8}) {
        if (name == name_of(type)) return type;
    }
    throw std::invalid_argument("a cache of type \"" + name + "\": f32, f16, bf16 and int8 are known");
}

const char* name_of(KvType type) {
    switch (type) {
        case KvType::f16: return "f16";
        case KvType::bf16: return "bf16";
        case KvType::int8: return "int8";
        default: return "f32";
    }
}

Cache::Cache(int layers, int pages, int page, int kv_heads, int head_dim, KvType type)
    : layers(layers), pages(pages), page(page), kv_heads(kv_heads), head_dim(head_dim), type(type) {
    auto within = [](int value, int most, const char* name) {
        if (value < 1 || value > most) {
            throw std::invalid_argument(std::string(name) + ": " + std::to_string(value) + " is not between 1 and " + std::to_string(most));
        }
    };
    within(layers, 1 << 12, "layers");
    within(pages, 1 << 26, "pages");
    within(page, 1 << 14, "page");
    within(kv_heads, 1 << 12, "kv_heads");
    within(head_dim, 1 << 12, "head_dim");
    if (page % UNIT) throw std::invalid_argument("page: " + std::to_string(page) + " positions are not a multiple of " + std::to_string(UNIT));
    if (head_dim % 2) throw std::invalid_argument("head_dim: " + std::to_string(head_dim) + " is odd");

    first_.type = type;
    first_.page = page;
    first_.kv_heads = kv_heads;
    first_.head_dim = head_dim;
    first_.padded = (head_dim + UNIT - 1) / UNIT * UNIT;
    const size_t each = size_of(type), positions = static_cast<size_t>(page);
    first_.key_block = whole_lines(static_cast<size_t>(head_dim) * positions * each);
    first_.value_block = whole_lines(static_cast<size_t>(first_.padded) * positions * each);
    const size_t blocks = static_cast<size_t>(pages) * static_cast<size_t>(kv_heads);
    // 2^12 * 2^14 * 4 bytes a block, 2^38 blocks, 2^12 layers: 128 bits are enough
    const unsigned __int128 all = static_cast<unsigned __int128>(first_.key_block + first_.value_block + 2 * positions * 4) * blocks *
                                  static_cast<unsigned>(layers);
    if (all >> 46) throw std::bad_alloc();
    keys_bytes_ = first_.key_block * blocks;
    values_bytes_ = first_.value_block * blocks;
    scales_bytes_ = type == KvType::int8 ? whole_lines(blocks * positions * 4) : 0;
    layer_bytes_ = keys_bytes_ + values_bytes_ + 2 * scales_bytes_;
    size_ = layer_bytes_ * static_cast<size_t>(layers);
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(memory);
}

Cache::~Cache() {
    if (data_) munmap(data_, size_);
}

KvLayer Cache::layer(int index) const {
    KvLayer view = first_;
    view.keys = data_ + layer_bytes_ * static_cast<size_t>(index);
    view.values = view.keys + keys_bytes_;
    if (scales_bytes_) {
        view.key_scales = reinterpret_cast<float*>(view.values + values_bytes_);
        view.value_scales = view.key_scales + scales_bytes_ / 4;
    }
    return view;
}

}  // namespace criadero
