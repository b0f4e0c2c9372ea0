//go:build cluster

// Package image proves what hack/build-image.sh makes.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
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

// build returns the image and its bill of materials.
func build(t *testing.T, arch string, env ...string) (archive, bill []byte) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "image.tar")
	cmd := exec.Command("../../hack/build-image.sh", out, arch)
	cmd.Env = append(append(os.Environ(), "VERSION="+version, "SOURCE_DATE_EPOCH="+epoch), env...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, text)
	}
	archive, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	bill, err = os.ReadFile(strings.TrimSuffix(out, ".tar") + ".cdx.json")
	if err != nil {
		t.Fatal(err)
	}
	return archive, bill
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

// checkBill holds a bill of materials against the program it is about and against
// the list of linked packages, of which it must name every module and no other.
func checkBill(t *testing.T, bill, program []byte) {
	t.Helper()
	type component struct {
		Name, Version, PURL string
		Hashes              []struct{ Alg, Content string }
	}
	var b struct {
		BOMFormat, SpecVersion string
		Metadata               struct {
			Timestamp string
			Component component
		}
		Components   []component
		Dependencies []struct{ DependsOn []string }
	}
	if err := json.Unmarshal(bill, &b); err != nil {
		t.Fatal(err)
	}
	about := b.Metadata.Component
	sum := sha256.Sum256(program)
	if b.BOMFormat != "CycloneDX" || b.Metadata.Timestamp != created || about.Version != version ||
		len(about.Hashes) != 1 || about.Hashes[0].Content != hex.EncodeToString(sum[:]) {
		t.Errorf("%s %s of %s about %+v", b.BOMFormat, b.SpecVersion, b.Metadata.Timestamp, about)
	}
	var got []string
	for _, c := range b.Components {
		if c.Name == "std" {
			continue
		}
		got = append(got, c.Name+" "+c.Version)
		if len(c.Hashes) != 1 || c.PURL != "pkg:golang/"+c.Name+"@"+c.Version {
			t.Errorf("%+v", c)
		}
	}
	list, err := os.ReadFile("../../docs/linked-packages.txt")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for line := range strings.Lines(string(list)) {
		if name, version, ok := strings.Cut(strings.TrimSpace(line), " "); ok && !strings.HasPrefix(line, " ") && name != "#" {
			want = append(want, name+" "+version)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the bill has\n%s\nand docs/linked-packages.txt\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(b.Dependencies) != 1 || len(b.Dependencies[0].DependsOn) != len(b.Components) {
		t.Errorf("%d components, dependencies %+v", len(b.Components), b.Dependencies)
	}
}

func TestImage(t *testing.T) {
	first, bill := build(t, runtime.GOARCH)
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
	second, billAgain := build(t, runtime.GOARCH, env...)
	if a, b := sha256.Sum256(first), sha256.Sum256(second); a != b {
		t.Errorf("two builds differ: %x and %x", a, b)
	}
	if !bytes.Equal(bill, billAgain) {
		t.Error("two builds have different bills of materials")
	}
	checkBill(t, bill, layer["agent"])

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
	archive, bill := build(t, arch)
	_, config, layer := image(t, archive)
	checkBill(t, bill, layer["agent"])
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
