// The part of ONNX Runtime's C interface that the operators use, so that no headers of it are needed to compile them.
//
// OrtApi is a table of functions that only ever grows at its end: the index of each stays the same in every version.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define MOLMO_CALL __stdcall
#else
#define MOLMO_CALL
#endif

extern "C" {

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape;  // OrtTensorTypeAndShapeInfo
typedef struct OrtShapeContext OrtShapeContext;
typedef struct OrtOpAttr OrtOpAttr;
typedef void (*OrtFunction)(void);

struct OrtApi {
    OrtFunction functions[275];
};

struct OrtApiBase {
    const OrtApi*(MOLMO_CALL* GetApi)(uint32_t version);
    const char*(MOLMO_CALL* GetVersionString)(void);
};

struct OrtCustomOp {
    uint32_t version;
    void*(MOLMO_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char*(MOLMO_CALL* GetName)(const OrtCustomOp*);
    const char*(MOLMO_CALL* GetExecutionProviderType)(const OrtCustomOp*);
    int(MOLMO_CALL* GetInputType)(const OrtCustomOp*, size_t);
    size_t(MOLMO_CALL* GetInputTypeCount)(const OrtCustomOp*);
    int(MOLMO_CALL* GetOutputType)(const OrtCustomOp*, size_t);
    size_t(MOLMO_CALL* GetOutputTypeCount)(const OrtCustomOp*);
    void(MOLMO_CALL* KernelCompute)(void*, OrtKernelContext*);
    void(MOLMO_CALL* KernelDestroy)(void*);
    int(MOLMO_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t);
    int(MOLMO_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int(MOLMO_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t);
    int(MOLMO_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
    int(MOLMO_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int(MOLMO_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
    int(MOLMO_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus*(MOLMO_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus*(MOLMO_CALL* KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus*(MOLMO_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeContext*);
    int(MOLMO_CALL* GetStartVersion)(const OrtCustomOp*);
    int(MOLMO_CALL* GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

namespace molmo::ort {

constexpr uint32_t kVersion = 17;  // of the interface: ONNX Runtime 1.17, the first with shapes of custom operators
constexpr int kAnyType = 0, kFloat = 1, kBytes = 2, kSignedBytes = 3, kInt32 = 6, kInt64 = 7, kHalf = 10;

template <int Index, typename... Arguments>
OrtStatus* call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<OrtStatus*(MOLMO_CALL*)(Arguments...)>(api->functions[Index])(arguments...);
}

template <int Index, typename T>
void release(const OrtApi* api, T* object) {
    reinterpret_cast<void(MOLMO_CALL*)(T*)>(api->functions[Index])(object);
}

enum : int {
    kCreateStatus = 0,
    kGetMessage = 2,
    kCreateCustomOpDomain = 26,
    kAddToDomain = 27,
    kAddDomain = 28,
    kGetData = 51,
    kSetDimensions = 59,
    kGetType = 60,
    kGetRank = 61,
    kGetDimensions = 62,
    kGetSymbols = 63,
    kGetShape = 65,
    kGetFloat = 85,
    kGetInteger = 86,
    kGetInputCount = 88,
    kGetInput = 90,
    kGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseShape = 99,
    kGetNodeInputCount = 230,
    kGetNodeInputName = 232,
    kGetConstant = 249,
    kGetInputShape = 268,
    kGetAttribute = 269,
    kSetOutputShape = 270,
    kReadAttribute = 272,
    kParallelFor = 274,
};

}  // namespace molmo::ort
