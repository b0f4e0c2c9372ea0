package rig

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
)

// ImageArchive writes a container image of one static program to the file out,
// in the format of "docker save", which containerd imports. It takes a fraction
// of a second where building the real image takes half a minute, and its layer
// is not compressed, which an emulated node would have to undo.
func ImageArchive(out, reference, program string) error {
	binary, err := os.ReadFile(program)
	if err != nil {
		return fmt.Errorf("reading the program of image %s: %w", reference, err)
	}
	name := "/" + filepath.Base(program)
	var layer bytes.Buffer
	if err := writeTar(&layer, tarFile{name[1:], 0o755, binary}); err != nil {
		return fmt.Errorf("writing the layer of image %s: %w", reference, err)
	}
	layerID := sha256.Sum256(layer.Bytes())
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": []string{name}, "Env": []string{"PATH=/"}},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(layerID[:])}},
	})
	if err != nil {
		return fmt.Errorf("describing image %s: %w", reference, err)
	}
	configID := sha256.Sum256(config)
	configName := hex.EncodeToString(configID[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{reference}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return fmt.Errorf("describing image %s: %w", reference, err)
	}
	f, err := os.Create(out)
	if err != nil {
		return fmt.Errorf("writing image %s: %w", reference, err)
	}
	defer f.Close()
	if err := writeTar(f, tarFile{"manifest.json", 0o644, manifest}, tarFile{configName, 0o644, config},
		tarFile{"layer.tar", 0o644, layer.Bytes()}); err != nil {
		return fmt.Errorf("writing image %s: %w", reference, err)
	}
	return f.Close()
}

// BuildPauseImage compiles the pause program and writes its image archive. It
// also serves as a container that does nothing.
func BuildPauseImage(ctx context.Context, out, reference string) error {
	dir, err := os.MkdirTemp("", "pause-")
	if err != nil {
		return fmt.Errorf("building the pause image: %w", err)
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "pause")
	if _, err := run(ctx, "", []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-ldflags", "-s -w",
		"-o", program, "github.com/hosthygiene/agent/test/rig/pause"); err != nil {
		return fmt.Errorf("building the pause image: %w", err)
	}
	return ImageArchive(out, reference, program)
}

type tarFile struct {
	name string
	mode int64
	data []byte
}

func writeTar(w io.Writer, files ...tarFile) error {
	tw := tar.NewWriter(w)
	for _, f := range files {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Format: tar.FormatPAX}); err != nil {
			return err
		}
		if _, err := tw.Write(f.data); err != nil {
			return err
		}
	}
	return tw.Close()
}
