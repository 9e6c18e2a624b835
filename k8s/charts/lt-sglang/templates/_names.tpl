{{- define "lt.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "lt.engine" -}}{{ include "lt.name" . }}-engine{{- end }}
{{- define "lt.gateway" -}}{{ include "lt.name" . }}-gateway{{- end }}

{{- define "lt.claim" -}}
{{ .Values.modelCache.existingClaim | default (printf "%s-models" (include "lt.name" .)) }}
{{- end }}

{{- /* Labels that never change: a Deployment's selector cannot. Call with (list . "engine"). */ -}}
{{- define "lt.selector" -}}
app.kubernetes.io/name: lt-sglang
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* Not of pods: they change with the chart's version, and every engine would start again for it. */ -}}
{{- define "lt.labels" -}}
{{ include "lt.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- /* The user's labels of a workload, which the chart's own win over. Call with (list . "engine" labels). */ -}}
{{- define "lt.workloadMeta" -}}
namespace: {{ (index . 0).Release.Namespace | quote }}
labels:
  {{- include "lt.labels" . | nindent 2 }}
  {{- with index . 2 }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- define "lt.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* An environment variable from a Secret. Call with (list "LT_API_KEY" secret). */ -}}
{{- define "lt.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ (index . 1).name | quote }}
      key: {{ (index . 1).key | quote }}
{{- end }}

{{- define "lt.meta" -}}
namespace: {{ (index . 0).Release.Namespace | quote }}
labels:
  {{- include "lt.labels" . | nindent 2 }}
{{- end }}

{{- define "lt.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "lt.servedName" -}}{{ .Values.model.servedName | default .Values.model.name | default .Values.model.path }}{{- end }}

{{- /* The last part is the model's own name: by it the known models' lazy layers are found. */ -}}
{{- define "lt.modelPath" -}}
{{ .Values.model.path | default (printf "/models/%s/%s" .Values.model.revision .Values.model.name) }}
{{- end }}

{{- define "lt.downloads" -}}{{ if and .Values.modelCache.download (not .Values.model.path) }}true{{ end }}{{- end }}
{{- define "lt.marker" -}}{{ include "lt.modelPath" . }}/.complete{{- end }}

{{- define "lt.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "lt.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
