// Generates with the two packages of export_model.py, without Python: generate PREFILL.pt2 DECODE.pt2 TOKENS < PROMPTS
// A prompt is a line of token numbers; the line printed for it has the tokens that come after it.

#include <chrono>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

// As export_model.py exports them: packages do not check lengths.
constexpr size_t kShortest = 5, kRoom = 128;

// [1, length, vocabulary] -> [1, 1], the best token of the last position
at::Tensor best(const at::Tensor& logits) {
  return logits.select(1, -1).argmax(-1, /*keepdim=*/true);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: generate PREFILL.pt2 DECODE.pt2 TOKENS < PROMPTS\n";
    return 2;
  }
  const size_t tokens = std::stoul(argv[3]);
  if (tokens < 1 || tokens > kRoom - kShortest) {
    std::cerr << "TOKENS: got " << argv[3] << ", expected 1 to " << kRoom - kShortest << "\n";
    return 2;
  }
  c10::InferenceMode guard;
  auto began = std::chrono::steady_clock::now();
  torch::inductor::AOTIModelPackageLoader prefill(argv[1]), decode(argv[2]);
  std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  std::cerr << "loaded in " << took.count() << " s\n";

  const at::Device device(prefill.get_metadata().at("AOTI_DEVICE_KEY"));  // that it was compiled for
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    const std::vector<int64_t> prompt(std::istream_iterator<int64_t>(words), {});
    if (!words.eof() || prompt.size() < kShortest || prompt.size() + tokens > kRoom) {
      std::cerr << "prompt: got '" << line << "', expected " << kShortest << " to " << kRoom - tokens << " numbers\n";
      return 2;
    }
    at::Tensor ids = at::tensor(prompt, at::kLong).unsqueeze(0).to(device);

    // Arguments and results are flat, a dict's values in the order of its keys at export: after the logits come the
    // states, as decode, exported with the dict that prefill returned, takes them after the token and its position.
    std::vector<at::Tensor> results = prefill.run({ids});
    std::vector<at::Tensor> arguments{best(results[0]), at::full({1, 1}, ids.size(1), ids.options())};
    arguments.insert(arguments.end(), results.begin() + 1, results.end());

    std::cout << arguments[0].item<int64_t>();
    for (size_t i = 1; i < tokens; ++i) {
      arguments[0] = best(decode.run(arguments)[0]);  // updates the states where they are
      arguments[1].add_(1);
      std::cout << ' ' << arguments[0].item<int64_t>();
    }
    std::cout << std::endl;
  }
}
