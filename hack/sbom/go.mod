// The library for bills of materials, apart from the product's own modules.
module github.com/hosthygiene/agent/hack/sbom

go 1.26.0

require github.com/CycloneDX/cyclonedx-go v0.12.0
