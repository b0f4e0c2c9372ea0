//go:build cluster

// Package image proves what hack/build-image.sh makes.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

const (
	version = "v0.0.0-test"
	epoch   = "1767225600" // 2026-01-01T00:00:00Z
	created = "2026-01-01T00:00:00Z"
)

func build(t *testing.T, arch string, env ...string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "image.tar")
	cmd := exec.Command("../../hack/build-image.sh", out, arch)
	cmd.Env = append(append(os.Environ(), "VERSION="+version, "SOURCE_DATE_EPOCH="+epoch), env...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, text)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// files are the regular files of a tar archive.
func files(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			out[h.Name] = data
		}
		if h.Typeflag == tar.TypeReg && h.Name == "agent" && h.Mode&0o7777 != 0o755 {
			t.Errorf("the program's mode is %o", h.Mode)
		}
	}
}

// image is the parsed archive: its names, its config and the files of its one
// layer.
func image(t *testing.T, archive []byte) (tags []string, config map[string]any, layer map[string][]byte) {
	t.Helper()
	in := files(t, archive)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(in["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	if len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("want one image with one layer: %+v", manifest)
	}
	if err := json.Unmarshal(in[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	return manifest[0].RepoTags, config, files(t, in[manifest[0].Layers[0]])
}

func TestImage(t *testing.T) {
	first := build(t, runtime.GOARCH)
	tags, config, layer := image(t, first)
	if want := []string{"ghcr.io/hosthygiene/agent:" + version}; !slices.Equal(tags, want) {
		t.Errorf("it is named %q, want %q", tags, want)
	}
	if config["created"] != created || config["architecture"] != runtime.GOARCH {
		t.Errorf("created %v for %v", config["created"], config["architecture"])
	}
	if len(layer) != 1 || layer["agent"] == nil {
		t.Fatalf("want /agent and nothing else, got %d files", len(layer))
	}

	// The same source makes the same bits; nightly also without the compiler's
	// cache, which takes minutes.
	var env []string
	if os.Getenv("HYGIENE_NIGHTLY") != "" {
		env = append(env, "GOCACHE="+t.TempDir())
	}
	second := build(t, runtime.GOARCH, env...)
	if a, b := sha256.Sum256(first), sha256.Sum256(second); a != b {
		t.Errorf("two builds differ: %x and %x", a, b)
	}

	// It needs nothing of a system: it runs where there is nothing else.
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "agent"), layer["agent"], 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("chroot", root, "/agent", "version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), version) {
		t.Errorf("agent version in an empty root: %v, %s", err, out)
	}
}

func TestImageForTheOtherArchitecture(t *testing.T) {
	arch, machine := "arm64", elf.EM_AARCH64
	if runtime.GOARCH == "arm64" {
		arch, machine = "amd64", elf.EM_X86_64
	}
	_, config, layer := image(t, build(t, arch))
	if config["architecture"] != arch {
		t.Errorf("the image says %v", config["architecture"])
	}
	f, err := elf.NewFile(bytes.NewReader(layer["agent"]))
	if err != nil {
		t.Fatal(err)
	}
	if f.Machine != machine {
		t.Errorf("the program is for %s", f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the program wants a dynamic linker, and there is none")
		}
	}
}
