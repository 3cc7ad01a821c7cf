# Homebrew's formula, for a tap of one's own; docs/install.md has the steps. There is no release to name yet, so it installs
# from the Git checkout that HOMEBREW_CHECKOUT names, by --HEAD.
class Turboserve < Formula
  desc "OpenAI-compatible server for MLX models with compressed KV caches"
  license "MIT"
  head ENV.fetch("HOMEBREW_CHECKOUT", ""), using: :git

  depends_on arch: :arm64
  depends_on :macos
  depends_on "python@3.12"

  def python
    Formula["python@3.12"].opt_bin/"python3.12"
  end

  def install
    system python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", libexec/"wheel", "."
    (etc/"turboserve").install "config/default.toml" => "turboserve.toml"
    bin.write_exec_script libexec/"venv/bin/turboserve"
  end

  # Here and not above, because Homebrew rewrites the library names of what `install` leaves, which MLX's have no room for.
  def post_install
    system python, "-m", "venv", "--clear", libexec/"venv"
    system libexec/"venv/bin/pip", "install", "--quiet", *Dir[libexec/"wheel/*.whl"]
  end

  service do
    run [opt_bin/"turboserve", "serve", "--config", etc/"turboserve/turboserve.toml"]
    keep_alive successful_exit: false
    log_path var/"log/turboserve.log"
    error_log_path var/"log/turboserve.log"
  end

  test do
    assert_match "metal", shell_output("#{bin}/turboserve --version")
  end
end
