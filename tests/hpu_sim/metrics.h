// The plugin's metrics file (PT_HPU_METRICS_FILE): how many graphs were compiled and which ops fell back.
// A JSON array. Each entry has metric_name, triggered_by, generated_on and statistics. "]" is written at exit.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

struct Metrics {
  std::ofstream file;
  int64_t compilations = 0;
  int64_t fallbacks = 0;
  std::map<std::string, int64_t> fallback_ops;

  static bool on(const std::string& trigger) {
    if (!std::getenv("PT_HPU_METRICS_FILE")) return false;
    const char* triggers = std::getenv("PT_HPU_METRICS_DUMP_TRIGGERS");
    std::istringstream list(triggers ? triggers : "process_exit");
    for (std::string word; std::getline(list, word, ',');) {
      if (word == trigger) return true;
    }
    return false;
  }

  void compiled() {
    ++compilations;
    if (on("metric_change")) write("graph_compilation", graph_compilation(), "metric_change");
  }

  void fell_back(const std::string& op) {
    ++fallbacks;
    ++fallback_ops[op];
    if (on("metric_change")) write("cpu_fallback", cpu_fallback(), "metric_change");
  }

  void end() {
    if (on("process_exit")) {
      write("graph_compilation", graph_compilation(), "process_exit");
      write("cpu_fallback", cpu_fallback(), "process_exit");
      write("memory_defragmentation", memory_defragmentation(), "process_exit");
    }
    if (file.is_open()) file << "]\n";
    file.close();
  }

 private:
  std::string graph_compilation() const {  // times are not simulated
    return "\"TotalNumber\": " + std::to_string(compilations) + ", \"TotalTime\": 0, \"AvgTime\": 0";
  }

  std::string cpu_fallback() const {
    std::ostringstream text;
    text << "\"TotalNumber\": " << fallbacks << ", \"FallbackOps\": {";
    const char* comma = "";
    for (const auto& [op, n] : fallback_ops) {
      text << comma << '"' << op << "\": " << n;
      comma = ", ";
    }
    text << "}";
    return text.str();
  }

  static std::string memory_defragmentation() {
    return "\"TotalNumber\": 0, \"TotalSuccessful\": 0, \"AvgTime\": 0, \"MaxTime\": 0";
  }

  void open() {
    std::string path = std::getenv("PT_HPU_METRICS_FILE");
    if (const char* rank = std::getenv("RANK")) {  // metrics.json -> metrics-rank0.json
      path.insert(std::min(path.rfind('.'), path.size()), std::string("-rank") + rank);
    }
    const size_t slash = path.rfind('/');
    // The plugin makes the file's folder, and Python cannot make a folder without a name.
    TORCH_CHECK(slash != std::string::npos, "FileNotFoundError: [Errno 2] No such file or directory: ''");
    std::filesystem::create_directories(path.substr(0, slash + 1));

    std::string unused = path;
    for (int i = 1; std::filesystem::exists(unused); ++i) unused = path + "." + std::to_string(i);
    file.open(unused);
    file << "[";
  }

  void write(const char* name, const std::string& statistics, const char* trigger) {
    const bool first = !file.is_open();
    if (first) open();
    char now[40];
    const std::time_t seconds = std::time(nullptr);
    std::strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%S", std::localtime(&seconds));
    file << (first ? "" : ",\n") << "{\"metric_name\": \"" << name << "\", \"triggered_by\": \"" << trigger
         << "\", \"generated_on\": \"" << now << "\", \"statistics\": {" << statistics << "}}" << std::flush;
  }
};
