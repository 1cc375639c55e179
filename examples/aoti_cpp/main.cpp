// Decodes with a package made by export_decode.py, without Python: decode MODEL.pt2 FIRST_TOKEN STEPS
// The package maps (token, conv states, SSM states) to logits and updates the states where they are.

#include <cstdlib>
#include <iostream>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// The shapes of the states, as export_decode.py makes them.
constexpr int64_t kLayers = 2, kHeads = 4, kHeadDim = 8, kState = 16, kWindow = 3;

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: decode MODEL.pt2 FIRST_TOKEN STEPS\n";
    return 2;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  std::vector<at::Tensor> inputs{at::tensor({std::atol(argv[2])}, at::kLong)};
  for (int64_t layer = 0; layer < kLayers; ++layer)
    inputs.push_back(at::zeros({1, kHeads * kHeadDim, kWindow}));
  for (int64_t layer = 0; layer < kLayers; ++layer)
    inputs.push_back(at::zeros({1, kHeads, kHeadDim, kState}));

  for (long step = 0; step < std::atol(argv[3]); ++step) {
    at::Tensor logits = model.run(inputs)[0];
    inputs[0] = logits.argmax(-1);
    std::cout << inputs[0].item<int64_t>() << (step + 1 < std::atol(argv[3]) ? " " : "\n");
  }
}
