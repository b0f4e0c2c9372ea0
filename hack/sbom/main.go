// Command sbom prints what is in a Go binary as a CycloneDX bill of materials.
//
//	go -C hack/sbom run . BINARY VERSION EPOCH
//
// It tells what the linker noted in BINARY itself (go version -m), so it can not be
// about another build. EPOCH, in seconds, is the bill's time: the same binary, VERSION
// and EPOCH give the same bytes.
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: sbom BINARY VERSION EPOCH")
		os.Exit(2)
	}
	if err := write(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func write(binary, version, epoch string) error {
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return fmt.Errorf("EPOCH: %w", err)
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	b, err := bill(info, data, version, time.Unix(seconds, 0).UTC())
	if err != nil {
		return err
	}
	// 1.7, the library's own choice, is not read by many scanners yet.
	return cdx.NewBOMEncoder(os.Stdout, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(b, cdx.SpecVersion1_6)
}

func bill(info *buildinfo.BuildInfo, binary []byte, version string, at time.Time) (*cdx.BOM, error) {
	sum := sha256.Sum256(binary)
	var settings []cdx.Property
	var platform []string
	for _, s := range info.Settings {
		settings = append(settings, cdx.Property{Name: "go:build:" + s.Key, Value: s.Value})
		if s.Key == "GOOS" || s.Key == "GOARCH" {
			platform = append(platform, strings.ToLower(s.Key)+"="+s.Value)
		}
	}
	slices.Sort(platform)
	agent := module(cdx.ComponentTypeApplication, info.Main.Path, version)
	agent.PackageURL += "?" + strings.Join(platform, "&")
	agent.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}}
	agent.Properties = &settings

	components := []cdx.Component{module(cdx.ComponentTypeLibrary, "std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, dep := range info.Deps {
		c, err := library(dep)
		if err != nil {
			return nil, err
		}
		components = append(components, c)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	var refs []string
	for _, c := range components {
		refs = append(refs, c.BOMRef)
	}

	b := cdx.NewBOM()
	id := sum[:16]
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // a UUID of one's own making, RFC 9562 version 8
	b.SerialNumber = fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	b.Metadata = &cdx.Metadata{
		Timestamp: at.Format(time.RFC3339),
		Tools:     &cdx.ToolsChoice{Components: &[]cdx.Component{{Type: cdx.ComponentTypeApplication, Name: info.Main.Path + "/hack/sbom"}}},
		Component: &agent,
	}
	b.Components = &components
	// What needs what is not noted in a binary.
	b.Dependencies = &[]cdx.Dependency{{Ref: agent.BOMRef, Dependencies: &refs}}
	return b, nil
}

func library(m *debug.Module) (cdx.Component, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	c := module(cdx.ComponentTypeLibrary, m.Path, m.Version)
	// "h1:" is the SHA-256 of the list of the files' own, in base64
	// (golang.org/x/mod/sumdb/dirhash); a module in a folder has none.
	if text, ok := strings.CutPrefix(m.Sum, "h1:"); ok {
		sum, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return c, fmt.Errorf("the hash of %s: %w", m.Path, err)
		}
		c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum)}}
	}
	return c, nil
}

func module(kind cdx.ComponentType, path, version string) cdx.Component {
	// https://github.com/package-url/purl-spec: "+" of a version is encoded.
	ref := "pkg:golang/" + path + "@" + url.QueryEscape(version)
	return cdx.Component{BOMRef: ref, Type: kind, Name: path, Version: version, PackageURL: ref}
}
